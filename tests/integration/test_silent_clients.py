"""A client that is stopped for a while, or far away on a bad line, keeps its connection."""

import asyncio
from pathlib import Path

from stack import stack, tiny_config

from pdserve.cluster.redis_server import RedisServer
from pdserve.core.channel_options import SERVER_OPTIONS

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
"""Of HTTP/2, with empty settings. Nothing follows: no ping is answered."""
PEER_MS = sum(dict(SERVER_OPTIONS)[f"grpc.keepalive_{part}_ms"] for part in ("time", "timeout"))
"""When a silent worker has been given up."""


async def test_a_client_that_answers_no_pings_is_not_cut_off_as_a_silent_worker_is(
    tiny_model: Path, redis: RedisServer
) -> None:
    async with stack(tiny_config(tiny_model, redis), {}) as cluster:
        assert cluster.router is not None
        reader, writer = await asyncio.open_connection("127.0.0.1", cluster.router.port)
        try:
            writer.write(PREFACE)
            assert await reader.read(9), "its settings"
            closed = asyncio.create_task(reader.read())
            assert not (await asyncio.wait({closed}, timeout=PEER_MS / 1000 + 0.5))[0]
            closed.cancel()
        finally:
            writer.close()
