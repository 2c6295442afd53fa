"""Streams over both APIs of a cluster with credentials, for tests that end it under load."""

import asyncio
import json
import ssl

import httpx
from served import Served

from pdserve.client import AsyncClient, Tls
from pdserve.core.errors import PdserveError

STREAMS = 8
"""Over gRPC, and as many over HTTP."""
TOKENS = 1500
FLOW_S = 60.0


class Load:
    """Streams that run until the cluster ends; what each saw last."""

    def __init__(self, served: Served, tls: Tls, token: str) -> None:
        self._served = served
        self._tls = tls
        self._token = token
        self._flowing = asyncio.Event()
        self._begun: set[str] = set()
        self.ends: dict[str, str] = {}

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for number in range(STREAMS):
                group.create_task(self._grpc(f"grpc-{number}"))
                group.create_task(self._http(f"http-{number}"))

    async def until_all_flow(self) -> None:
        """Every stream has had a token."""
        async with asyncio.timeout(FLOW_S):
            await self._flowing.wait()

    def _begin(self, name: str) -> None:
        self._begun.add(name)
        if len(self._begun) == 2 * STREAMS:
            self._flowing.set()

    async def _grpc(self, name: str) -> None:
        async with AsyncClient(self._served.target, timeout=120, tls=self._tls, token=self._token) as client:
            try:
                stream = await client.generate(
                    f"{name}: once upon", max_tokens=TOKENS, ignore_eos=True, stream=True
                )
                async for _ in stream:
                    self._begin(name)
                self.ends[name] = "finished"
            except PdserveError as error:
                self.ends[name] = "told" if error.retriable else repr(error)

    async def _http(self, name: str) -> None:
        body = {"prompt": f"{name}: once upon", "max_tokens": TOKENS, "ignore_eos": True, "stream": True}
        url = f"https://{self._served.record['http']}/v1/completions"
        headers = {"authorization": f"Bearer {self._token}"}
        end = "closed"
        try:
            async with (
                httpx.AsyncClient(timeout=120, verify=ssl_context(self._tls), headers=headers) as client,
                client.stream("POST", url, json=body) as answer,
            ):
                assert answer.status_code == 200, await answer.aread()
                async for line in answer.aiter_lines():
                    if line.startswith("data: {"):
                        self._begin(name)
                        end = "told" if "error" in json.loads(line[6:]) else end
                    elif line == "data: [DONE]":
                        end = "finished"
        except httpx.HTTPError as error:
            end = type(error).__name__
        self.ends[name] = end


def ssl_context(tls: Tls) -> ssl.SSLContext:
    """What an HTTP client needs for the same credentials."""
    context = ssl.create_default_context(cafile=tls.ca)
    context.load_cert_chain(tls.certificate, tls.key)
    return context
