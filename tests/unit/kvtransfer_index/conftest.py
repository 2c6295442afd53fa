"""A redis of their own for the tests that stop, kill and restart it."""

from collections.abc import AsyncIterator, Iterator

import pytest

from pdserve.cluster.redis_server import RedisServer, start_redis
from pdserve.kvtransfer.index.link import RedisLink


@pytest.fixture
def redis_server() -> Iterator[RedisServer]:
    server = start_redis()
    yield server
    server.stop()


@pytest.fixture
async def link(redis_server: RedisServer) -> AsyncIterator[RedisLink]:
    link = RedisLink(redis_server.url, "unit")
    yield link
    await link.close()
