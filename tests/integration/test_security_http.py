"""TLS and tokens on the HTTP API, and the bound on its headers, with real sockets."""

import asyncio
import contextlib
import dataclasses
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from stack import RouterSeams, Stack, tiny_config

from pdserve.cluster.redis_server import RedisServer
from pdserve.core.config import SecurityConfig
from pdserve.core.security.dev_certs import make_certificates

TOKEN = "token-of-the-tests-0123456789"


@pytest.fixture(scope="module")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("http-certs")
    make_certificates(folder)
    (folder / "tokens").write_text(f"tests:{TOKEN}\n")
    return folder


@contextlib.asynccontextmanager
async def http_door(model: Path, redis: RedisServer, security: SecurityConfig) -> AsyncIterator[int]:
    """A router without workers; the port of its HTTP API."""
    config = tiny_config(model, redis, security=security)
    config = dataclasses.replace(config, router=dataclasses.replace(config.router, http_port=0))
    running = Stack(config)
    try:
        await running.start_router(RouterSeams())
        assert running.router is not None
        assert running.router.http_port is not None
        yield running.router.http_port
    finally:
        await running.close()


def verifying(certs: Path, who: str | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=certs / "ca.pem")
    if who is not None:
        context.load_cert_chain(certs / f"{who}.pem", certs / f"{who}.key")
    return context


@pytest.mark.parametrize("header", [None, "Bearer wrong-token-0123456789", f"Basic {TOKEN}", TOKEN])
async def test_every_route_but_health_needs_a_token(
    tiny_model: Path, redis: RedisServer, certs: Path, header: str | None
) -> None:
    headers = {} if header is None else {"authorization": header}
    security = SecurityConfig(tokens_file=str(certs / "tokens"))
    routes: list[tuple[str, str, Any]] = [
        ("POST", "/v1/completions", {"model": "m", "prompt": "x"}),
        ("POST", "/v1/chat/completions", {"model": "m", "messages": []}),
        ("GET", "/v1/models", None),
        ("GET", "/v1/models/m", None),
        ("GET", "/metrics", None),
        ("GET", "/version", None),
        ("GET", "/openapi.json", None),
        ("GET", "/nowhere", None),
        ("GET", "/health/../v1/models", None),
    ]
    async with (
        http_door(tiny_model, redis, security) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client,
    ):
        for method, path, body in routes:
            answer = await client.request(method, path, json=body, headers=headers)
            assert answer.status_code == 401, path
            assert answer.headers["www-authenticate"] == "Bearer"
            error = answer.json()["error"]
            assert error["code"] == "invalid_api_key"
            assert {"message", "type", "param"} < set(error)
            assert TOKEN not in answer.text
        assert (await client.get("/health", headers=headers)).status_code == 200
        assert (await client.get("/ready", headers=headers)).status_code == 503
        known = {"authorization": f"Bearer {TOKEN}"}
        assert (await client.get("/v1/models", headers=known)).status_code == 200


async def test_https_checks_both_sides(tiny_model: Path, redis: RedisServer, certs: Path) -> None:
    security = SecurityConfig(tls_dir=str(certs), client_certificates=True)
    async with http_door(tiny_model, redis, security) as port:
        for host in ("127.0.0.1", "localhost"):
            async with httpx.AsyncClient(verify=verifying(certs, "client")) as client:
                assert (await client.get(f"https://{host}:{port}/v1/models")).status_code == 200
        async with httpx.AsyncClient(verify=verifying(certs)) as client:
            with pytest.raises((httpx.ReadError, httpx.ConnectError, httpx.RemoteProtocolError)):
                await client.get(f"https://127.0.0.1:{port}/health")
        async with httpx.AsyncClient() as client:
            with pytest.raises(httpx.ConnectError, match="certificate verify failed"):
                await client.get(f"https://127.0.0.1:{port}/health")
            with pytest.raises(httpx.TransportError):
                await client.get(f"http://127.0.0.1:{port}/health")


@pytest.mark.parametrize(
    "start", [b"GET /health HTTP/1.1\r\nx-long: ", b"GET /", b"GET /health HTTP/1.1\r\nhost: a\r\n"]
)
async def test_headers_that_never_end_are_cut_off(tiny_model: Path, redis: RedisServer, start: bytes) -> None:
    piece = b"x: y\r\n" * 1000 if start.endswith(b"\r\n") else b"a" * 6000
    async with http_door(tiny_model, redis, SecurityConfig()) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        answer = asyncio.create_task(reader.read())
        writer.write(start)
        sent = 0
        with contextlib.suppress(ConnectionError):
            while not answer.done() and sent < 100_000_000:
                writer.write(piece)
                await writer.drain()
                sent += len(piece)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await answer
        assert sent < 20_000_000, "the server read it all"
        async with httpx.AsyncClient() as client:
            fine = {f"x-{n}": "y" * 1000 for n in range(30)}
            good = await client.get(f"http://127.0.0.1:{port}/health", headers=fine)
            assert good.status_code == 200
            assert (await client.get(f"http://127.0.0.1:{port}/health")).status_code == 200
