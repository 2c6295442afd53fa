"""SIGTERM under load: streams are told, and the machine is as it was before."""

import asyncio
import json
import os
import signal
import socket
from pathlib import Path

import httpx
import pytest
from served import Served

from pdserve.client import AsyncClient
from pdserve.core.errors import PdserveError

pytestmark = pytest.mark.timeout(150)

STREAMS = 8
"""Over gRPC, and as many over HTTP."""
TOKENS = 1500
FLOW_S = 60.0
GRPC_POLLER_FDS = 8
"""The library's own, opened with the first channel; none per channel or call."""


class Load:
    """Streams that run until the cluster ends; what each saw last."""

    def __init__(self, served: Served) -> None:
        self._served = served
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
        async with AsyncClient(self._served.target, timeout=120) as client:
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
        url = f"http://{self._served.record['http']}/v1/completions"
        end = "closed"
        try:
            async with (
                httpx.AsyncClient(timeout=120) as client,
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


async def test_sigterm_under_load_leaves_no_process_port_segment_or_file(tiny_model: Path) -> None:
    flags = ("--model", str(tiny_model), "--http-port", "0", "--prefill", "2", "--decode", "2")
    served = await asyncio.to_thread(Served, *flags, "--drain-grace", "0")
    own_fds = open_fds()
    load = Load(served)
    running = asyncio.create_task(load.run())
    try:
        await load.until_all_flow()
        ports = served.listening_ports()
        assert {port_of(served.record["grpc"]), port_of(served.record["http"])} <= ports
    finally:
        status = await asyncio.to_thread(served.stop, signal.SIGTERM)
    assert status == 0, served.log[-4000:]
    await running
    assert await asyncio.to_thread(served.left_behind) == {}
    assert not [port for port in ports if is_listening(port)]
    assert "Traceback" not in served.log, served.log[-4000:]
    # Nobody waits in vain: a stream ended by itself, or was told that a retry may help.
    assert set(load.ends.values()) <= {"finished", "told"}, load.ends
    assert "told" in load.ends.values(), "the load ended before the signal"
    assert open_fds() <= own_fds + GRPC_POLLER_FDS


def port_of(endpoint: str) -> int:
    return int(endpoint.rpartition(":")[2])


def is_listening(port: int) -> bool:
    """Whether anybody accepts on it now."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def open_fds() -> int:
    """File descriptors of this process."""
    return len(os.listdir("/proc/self/fd"))
