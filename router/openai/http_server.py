"""uvicorn inside the router's own event loop: one listening socket, started and stopped like the others."""

import asyncio
import os
import socket
import ssl

import uvicorn
from starlette.types import ASGIApp

from pdserve.core.errors import ConfigError
from pdserve.router.openai.bounded_head import BoundedHeadProtocol

_BACKLOG = 1024
_KEEP_ALIVE_S = 75
"""Longer than the pools of common clients and proxies keep an idle connection."""


class HttpServer:
    """Serves `app` on one port. Signals are left to the process; TLS and guards are given from outside."""

    def __init__(
        self, app: ASGIApp, host: str, port: int, *, grace_s: float, tls: ssl.SSLContext | None = None
    ) -> None:
        """`grace_s`: how long `stop` lets running answers go on; the client's end of a stream included."""
        self._host = host
        self._port = port
        config = uvicorn.Config(
            app,
            http=BoundedHeadProtocol,
            ws="none",
            lifespan="off",
            loop="none",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=grace_s,  # type: ignore[arg-type]  # it goes to asyncio.wait_for
            ssl_context_factory=None if tls is None else lambda config, default: tls,
        )
        self._server = uvicorn.Server(config)
        self._config = config
        self._listener: socket.socket | None = None
        self._ticks: asyncio.Task[None] | None = None

    @property
    def port(self) -> int:
        """The port that it listens on."""
        if self._listener is None:
            raise RuntimeError("the HTTP server has not been started")
        return self._port

    async def start(self) -> None:
        """Listen. Raises ConfigError when that cannot be."""
        self._listener = listener = self._listen()
        self._port = int(listener.getsockname()[1])
        # The steps of uvicorn's own `serve`, which would take the process's signals.
        self._config.load()
        self._server.lifespan = self._config.lifespan_class(self._config)
        await self._server.startup([listener])
        self._ticks = asyncio.create_task(self._server.main_loop(), name="http-server")

    def close(self) -> None:
        """Begin to stop; `stopped` does the rest."""
        self._server.should_exit = True

    async def stopped(self) -> None:
        """Returns when all answers ended, or their grace is over and they were cut off. After `close`."""
        if self._ticks is not None and self._listener is not None:
            await asyncio.wait({self._ticks})
            await self._server.shutdown([self._listener])

    def _listen(self) -> socket.socket:
        address = (self._host, self._port)
        try:
            family = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0][0]
            listener = socket.create_server(address, family=family, backlog=_BACKLOG)
        except OSError as error:
            of_system = error.errno is not None and not isinstance(error, socket.gaierror)
            why = os.strerror(error.errno or 0) if of_system else error.strerror
            raise ConfigError(
                f"cannot listen on {self._host}:{self._port} ({why}): choose another router.http_port"
            ) from error
        # Accepted connections inherit it: no token may wait until the client acknowledges the one before.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
