"""A router as a process, or inside one: `python -m pdserve.router` and the Ray actor host the same thing."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any, TextIO

from pdserve.core.catalog import resolve_model
from pdserve.core.config import ServeConfig, from_mapping, to_mapping
from pdserve.core.errors import ConfigError
from pdserve.core.text.tokenizer import Tokenizer
from pdserve.kvtransfer.index.link import RedisLink
from pdserve.kvtransfer.index.membership_view import MembershipView
from pdserve.kvtransfer.index.metered import MeteredIndex
from pdserve.kvtransfer.index.redis_index import RedisIndex
from pdserve.kvtransfer.index.redis_membership import RedisMembership
from pdserve.router.server import RouterServer


@dataclass(frozen=True, slots=True)
class RouterSpec:
    """Everything that a router needs; crosses processes as JSON."""

    config: ServeConfig = field(default_factory=ServeConfig)
    """`index.redis_url` must be set: a router starts no server."""
    admin: str = ""
    """host:port of the Admin service, empty when nobody supervises."""
    own_token: str = field(default="", repr=False)
    """What the supervisor calls with, where callers need tokens."""

    def to_dict(self) -> dict[str, Any]:
        return to_mapping(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "RouterSpec":
        """Raises ConfigError for unknown keys and wrong types."""
        return from_mapping(cls, fields)


class RouterHost:
    """A running router with what it owns: redis connections, membership view, server."""

    def __init__(self, spec: RouterSpec) -> None:
        self._spec = spec
        self._owned = AsyncExitStack()
        self._server: RouterServer | None = None

    @property
    def endpoint(self) -> str:
        """host:port on which clients call."""
        if self._server is None:
            raise RuntimeError("the router has not been started")
        return f"{self._spec.config.router.host}:{self._server.port}"

    @property
    def http_endpoint(self) -> str | None:
        """host:port of the HTTP API; None: it is not served."""
        port = None if self._server is None else self._server.http_port
        return None if port is None else f"{self._spec.config.router.host}:{port}"

    async def start(self) -> None:
        """Listen. Raises ConfigError for a wrong model, redis URL or port; waits for a redis that is away."""
        config = self._spec.config
        url = config.index.redis_url
        if url is None:
            raise ConfigError("index.redis_url is None: a router needs the URL of the cluster's redis")
        tokenizer = await asyncio.to_thread(lambda: Tokenizer.load(resolve_model(config.model)))
        try:
            link = RedisLink(url, config.index.cluster)
            self._owned.push_async_callback(link.close)
            index = MeteredIndex(RedisIndex(link, config.index.timeout_s))
            membership = RedisMembership(link, config.index.ttl_s)
            view = MembershipView(membership, config.index.heartbeat_s, config.index.ttl_s)
            await view.refresh()
            view.start()
            self._owned.push_async_callback(view.stop)
            server = RouterServer(
                config,
                index,
                view,
                {config.model: tokenizer},
                self._spec.admin,
                index_stats=index.stats,
                own_token=self._spec.own_token,
            )
            await server.start()
            self._owned.push_async_callback(server.stop)
        except BaseException:
            await self._owned.aclose()
            raise
        self._server = server

    async def stop(self) -> None:
        """End running calls within a short grace and give everything back."""
        await self._owned.aclose()


async def run_router(spec: RouterSpec, out: TextIO = sys.stdout) -> None:
    """Serve until SIGTERM or SIGINT. Writes one JSON line to `out` when it listens."""
    asked_to_stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked_to_stop.set)
    host = RouterHost(spec)
    await host.start()
    try:
        print(
            json.dumps({"grpc": host.endpoint, "http": host.http_endpoint, "pid": os.getpid()}),
            file=out,
            flush=True,
        )
        await asked_to_stop.wait()
    finally:
        await host.stop()
