"""One redis server as pdserve uses it: scripts, time-outs, one kind of error."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from enum import StrEnum
from importlib.resources import files
from typing import Any

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.commands.core import AsyncScript
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from pdserve.core.errors import ConfigError
from pdserve.kvtransfer.index.base import IndexUnavailable

UPDATE_TIMEOUT_S = 1.0
"""Of updates of the index, and the most that a membership call waits."""

_CONNECTIONS = 16
_CLOSE_TIMEOUT_S = 1.0

Argument = bytes | str | int


class Script(StrEnum):
    """The Lua scripts, `<name>.lua` beside this file. Their first key is the cluster's prefix."""

    ANNOUNCE = "announce"
    APPLY = "apply"
    DROP = "drop"
    HEARTBEAT = "heartbeat"
    HOLDERS = "holders"
    LISTING = "listing"
    LOCATE = "locate"
    SWEEP = "sweep"
    WITHDRAW = "withdraw"


class RedisLink:
    """A pool of connections to one server, for the keys of one cluster. Belongs to one event loop.

    All keys start with `pdserve:{<cluster>}:`. The braces make it one hash slot, so that the scripts are
    legal on a redis cluster too. Connects at first use; after any failure the next call starts afresh.
    """

    def __init__(self, url: str, cluster: str = "default") -> None:
        """Raises ConfigError for what is not a redis URL, without repeating it: it may hold a password."""
        try:
            pool = BlockingConnectionPool.from_url(
                url,
                max_connections=_CONNECTIONS,
                timeout=None,  # the time-out of the call covers the wait for a connection
                retry=Retry(NoBackoff(), 0),
                protocol=2,
                driver_info=None,
            )
        except ValueError:
            raise ConfigError(
                "index.redis_url is not a redis URL: write redis://host:port/db, rediss:// or unix://"
            ) from None
        kwargs = pool.connection_kwargs
        self.where = kwargs.get("path") or f"{kwargs.get('host', 'localhost')}:{kwargs.get('port', 6379)}"
        """The server without its password, for messages."""
        self._prefix = f"pdserve:{{{cluster}}}"
        self._client = Redis(connection_pool=pool)
        folder = files(__package__)
        self._scripts: dict[Script, AsyncScript] = {
            script: AsyncScript(self._client, folder.joinpath(f"{script}.lua").read_text())
            for script in Script
        }

    def key(self, *parts: str) -> str:
        """The name of one of the cluster's keys, as the scripts build it."""
        return ":".join((self._prefix, *parts))

    async def run(self, script: Script, arguments: Sequence[Argument], timeout_s: float) -> Any:
        """Run one script. Raises IndexUnavailable after `timeout_s`, or at once where the server refuses."""
        async with self._answer_to(script, timeout_s):
            return await self._scripts[script](keys=[self._prefix], args=arguments)

    async def scan_set(self, key: str, timeout_s: float) -> list[bytes]:
        """Members of a set, read in steps that block the server for no longer than a small command."""
        members: dict[bytes, None] = {}
        cursor = 0
        while True:
            async with self._answer_to("SSCAN", timeout_s):
                cursor, page = await self._client.sscan(key, cursor, count=1000)
            members.update((member, None) for member in page if isinstance(member, bytes))
            if cursor == 0:
                return list(members)

    async def close(self) -> None:
        """Close the connections. Never raises, never hangs."""
        try:
            async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                await self._client.aclose(close_connection_pool=True)
        except (TimeoutError, RedisError, OSError):
            return  # the server is away; the sockets go with the pool

    @asynccontextmanager
    async def _answer_to(self, what: str, timeout_s: float) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(timeout_s):
                yield
        except (TimeoutError, RedisTimeoutError) as error:  # whichever of the two clocks noticed first
            raise IndexUnavailable(
                f"redis at {self.where} gave no answer to {what} within {timeout_s:g} s"
            ) from error
        except (RedisError, OSError) as error:
            raise IndexUnavailable(f"redis at {self.where} failed {what}: {error}") from error
