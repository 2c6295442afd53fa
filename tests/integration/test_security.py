"""TLS, mTLS and tokens with real sockets: what is let in, what is refused, and how clearly that is said."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from stack import RouterSeams, Stack, stack, tiny_config

from pdserve.client import AsyncClient, RetryPolicy, Tls
from pdserve.cluster.redis_server import RedisServer
from pdserve.core.config import HandoffConfig, SecurityConfig, ServeConfig
from pdserve.core.errors import Overloaded, Unauthenticated, Unavailable
from pdserve.core.security.dev_certs import make_certificates
from pdserve.core.security.tls import WORKER_NAME, ClientTls, Identity, read_ca
from pdserve.core.types import Role
from pdserve.proto import handoff_pb2, handoff_pb2_grpc, worker_pb2, worker_pb2_grpc
from pdserve.proto.connections import connect

PROMPT = "a prompt of several blocks, which is why it is as long as this, and then somewhat longer"
TOKENS = 12
TOKEN = "token-of-the-tests-0123456789"
ONCE = RetryPolicy(attempts=1)
DISAGGREGATED = {"p": Role.PREFILL, "d": Role.DECODE}


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ours")
    make_certificates(folder)
    (folder / "tokens").write_text(f"tests:{TOKEN}\n")
    return folder


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificates of the same names, by somebody else."""
    folder = tmp_path_factory.mktemp("theirs")
    make_certificates(folder)
    return folder


def everything_on(folder: Path) -> SecurityConfig:
    return SecurityConfig(tls_dir=str(folder), client_certificates=True, tokens_file=str(folder / "tokens"))


def client_tls(folder: Path, who: str = "client") -> Tls:
    return Tls(folder / "ca.pem", folder / f"{who}.pem", folder / f"{who}.key")


def credentials(folder: Path) -> dict[str, Any]:
    return {"tls": client_tls(folder), "token": TOKEN}


def config_of(
    model: Path, redis: RedisServer, security: SecurityConfig, transport: str = "auto"
) -> ServeConfig:
    return tiny_config(model, redis, security=security, handoff=HandoffConfig(transport=transport))


async def completion(cluster: Stack) -> tuple[Sequence[int], str]:
    """Its token ids, and how the KV cache travelled."""
    assert cluster.client is not None
    result = await cluster.client.generate(PROMPT, max_tokens=TOKENS, ignore_eos=True, seed=7)
    return result.token_ids, result.route.transport


async def test_with_everything_on_a_disaggregated_request_gives_the_same_tokens_over_every_transport(
    tiny_model: Path, redis: RedisServer, ours: Path
) -> None:
    async with stack(config_of(tiny_model, redis, SecurityConfig()), DISAGGREGATED) as plain:
        expected, _ = await completion(plain)
    assert len(expected) == TOKENS
    for transport in ("inproc", "shm", "tcp"):
        config = config_of(tiny_model, redis, everything_on(ours), transport)
        async with stack(config, DISAGGREGATED, credentials=credentials(ours)) as secure:
            assert await completion(secure) == (expected, transport)


async def test_a_worker_of_another_ca_is_refused_and_the_log_says_so_while_others_serve(
    tiny_model: Path, redis: RedisServer, ours: Path, theirs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of(tiny_model, redis, everything_on(ours))
    with caplog.at_level(logging.WARNING):
        async with stack(config, {"m": Role.MIXED}, credentials=credentials(ours)) as cluster:
            foreign = SecurityConfig(tls_dir=str(theirs))
            await cluster.add_worker("stranger", Role.MIXED, security=foreign, seen=False)
            async with asyncio.timeout(20):
                while "no session with stranger" not in caplog.text:
                    await asyncio.sleep(0.02)
            assert cluster.client is not None
            states = {worker.worker: worker.state for worker in (await cluster.client.status()).workers}
            assert states["m"] == "ready"
            assert states["stranger"] != "ready"
            assert len((await completion(cluster))[0]) == TOKENS
    assert "CERTIFICATE_VERIFY_FAILED" in caplog.text
    assert "certificates of the cluster's CA" in caplog.text


@pytest.mark.parametrize("foreign", ["p", "d"])
async def test_neither_side_of_a_handoff_takes_a_stranger_and_the_log_says_which_stream_broke(
    tiny_model: Path,
    redis: RedisServer,
    ours: Path,
    theirs: Path,
    tmp_path: Path,
    foreign: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The router, and the stranger, believe in both CAs; the other worker only in ours."""
    both = tmp_path / "both.pem"
    both.write_bytes((ours / "ca.pem").read_bytes() + (theirs / "ca.pem").read_bytes())
    router = SecurityConfig(tls_dir=str(ours), tls_ca=str(both))
    running = Stack(config_of(tiny_model, redis, router), {"tls": Tls(ours / "ca.pem")})
    try:
        for name, role in DISAGGREGATED.items():
            stranger = SecurityConfig(tls_dir=str(theirs), tls_ca=str(both))
            security = stranger if name == foreign else SecurityConfig(tls_dir=str(ours))
            await running.add_worker(name, role, security=security)
        await running.start_router(RouterSeams())
        await running.until_ready(list(DISAGGREGATED))
        with caplog.at_level(logging.INFO):
            tokens, transport = await completion(running)
        assert (len(tokens), transport) == (TOKENS, ""), "it is prefilled where it decodes"
        assert "p did not serve: the stream to" in caplog.text
        assert running.workers["d"].handoffs.counters.get("handoffs_committed", 0) == 0
        assert running.workers["p"].prefill.in_flight() == 0
        await running.settled()
    finally:
        await running.close()


def worker_tls(ca: Path, identity: Path | None, who: str = "worker") -> ClientTls:
    own = None if identity is None else Identity.load(*(str(identity / f"{who}.{e}") for e in ("pem", "key")))
    return ClientTls(read_ca(str(ca / "ca.pem")), own, WORKER_NAME)


async def open_session(channel: grpc.aio.Channel) -> object:
    call = worker_pb2_grpc.WorkerStub(channel).Session()
    await call.write(worker_pb2.SessionRequest(hello=worker_pb2.SessionHello(router="r")))
    return await call.read()


async def open_handoff(channel: grpc.aio.Channel) -> object:
    call = handoff_pb2_grpc.HandoffStub(channel).Handoff()
    await call.write(handoff_pb2.DecodeMessage())
    return await call.read()


async def inspect_worker(channel: grpc.aio.Channel) -> object:
    return await worker_pb2_grpc.WorkerStub(channel).Inspect(worker_pb2.InspectRequest())


async def drain_worker(channel: grpc.aio.Channel) -> object:
    return await worker_pb2_grpc.WorkerStub(channel).Drain(worker_pb2.DrainRequest())


async def test_a_worker_answers_nobody_without_a_certificate_of_the_clusters_ca(
    tiny_model: Path, redis: RedisServer, ours: Path, theirs: Path
) -> None:
    config = config_of(tiny_model, redis, everything_on(ours))
    callers = {
        "plain text": None,
        "no certificate": worker_tls(ours, None),
        "another CA's": worker_tls(ours, theirs),
        "a client's": worker_tls(ours, ours, "client"),
    }
    calls: list[Callable[[grpc.aio.Channel], Awaitable[object]]] = [
        open_session,
        open_handoff,
        inspect_worker,
        drain_worker,
    ]
    async with stack(config, {"m": Role.MIXED}, credentials=credentials(ours)) as cluster:
        endpoint = cluster.workers["m"].record().endpoint
        for who, tls in callers.items():
            for call in calls:
                async with asyncio.timeout(10), connect(endpoint, (), tls) as channel:
                    with pytest.raises((grpc.aio.AioRpcError, asyncio.InvalidStateError)) as refused:
                        await call(channel)
                if isinstance(refused.value, grpc.aio.AioRpcError):
                    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE, (who, call)
        async with connect(endpoint, (), worker_tls(ours, ours)) as channel:
            assert await inspect_worker(channel)
        assert not cluster.workers["m"].record().draining


async def test_with_client_certificates_others_are_refused_at_the_front_door(
    tiny_model: Path, redis: RedisServer, ours: Path, theirs: Path
) -> None:
    strangers: dict[str, Tls | bool] = {
        "plain text": False,
        "no certificate": Tls(ours / "ca.pem"),
        "another CA's certificate": Tls(ours / "ca.pem", theirs / "client.pem", theirs / "client.key"),
        "another CA's idea of the server": client_tls(theirs),
    }
    async with door(config_of(tiny_model, redis, everything_on(ours)), credentials(ours)) as target:
        for who, tls in strangers.items():
            async with AsyncClient(target, timeout=10, retry=ONCE, tls=tls, token=TOKEN) as client:
                with pytest.raises(Unavailable) as refused:
                    await client.status()
            if who.endswith("server"):
                assert "CERTIFICATE_VERIFY_FAILED" in refused.value.message
        async with AsyncClient(target, timeout=10, **credentials(ours)) as client:
            await client.status()


@pytest.mark.parametrize("token", [None, "wrong-token-0123456789", TOKEN[:-1], TOKEN.upper()])
async def test_every_call_but_health_needs_a_token(
    tiny_model: Path, redis: RedisServer, ours: Path, token: str | None
) -> None:
    config = config_of(tiny_model, redis, SecurityConfig(tokens_file=str(ours / "tokens")))
    async with door(config, {"token": TOKEN}) as target:
        async with AsyncClient(target, timeout=10, token=token) as client:
            calls = (client.generate("x"), client.tokenize("x"), client.models(), client.status())
            for call in calls:
                with pytest.raises(Unauthenticated) as refused:
                    await call
                assert not refused.value.retriable
                assert TOKEN not in refused.value.message
        async with connect(target, (), None, token) as channel:
            asked = reflection_pb2.ServerReflectionRequest(list_services="")
            stub = reflection_pb2_grpc.ServerReflectionStub(channel)
            with pytest.raises(grpc.aio.AioRpcError) as unknown:
                await stub.ServerReflectionInfo(iter([asked])).read()
            assert unknown.value.code() is grpc.StatusCode.UNAUTHENTICATED
            health = health_pb2_grpc.HealthStub(channel)
            assert await health.Check(health_pb2.HealthCheckRequest()) is not None
        async with connect(target, (), None, TOKEN) as channel:
            stub = reflection_pb2_grpc.ServerReflectionStub(channel)
            answer = await stub.ServerReflectionInfo(iter([asked])).read()
            assert "pdserve.v1.Inference" in str(answer)


async def test_metadata_has_a_bound(tiny_model: Path, redis: RedisServer) -> None:
    async with door(config_of(tiny_model, redis, SecurityConfig()), {}) as target:
        async with AsyncClient(target, timeout=10, retry=ONCE, token="x" * 65536) as client:
            with pytest.raises(Overloaded, match="metadata"):
                await client.status()
        async with AsyncClient(target, timeout=10) as client:
            assert await client.status() is not None


@contextlib.asynccontextmanager
async def door(config: ServeConfig, credentials: dict[str, Any]) -> AsyncIterator[str]:
    """A router without workers; its target."""
    running = Stack(config, credentials)
    try:
        await running.start_router(RouterSeams())
        assert running.router is not None
        yield f"127.0.0.1:{running.router.port}"
    finally:
        await running.close()
