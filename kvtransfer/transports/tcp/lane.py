"""A place for one connection to a P: opened by who needs it first, and again after it was lost."""

import asyncio
import socket
import ssl

from pdserve.kvtransfer.pool.storage import KvStorage
from pdserve.kvtransfer.transports.tcp.connection import Connection
from pdserve.kvtransfer.transports.tcp.wire import Hello, tune


class Lane:
    """Has at most one connection at a time."""

    def __init__(
        self,
        address: tuple[str, int],
        hello: Hello,
        storage: KvStorage,
        timeout_s: float,
        tls: ssl.SSLContext | None,
    ) -> None:
        self._address = address
        self._hello = hello
        self._storage = storage
        self._timeout_s = timeout_s
        self._tls = tls
        self._connection: Connection | None = None
        self._opening: asyncio.Task[Connection] | None = None
        self._closed = False

    async def connection(self) -> Connection:
        """A welcomed connection, opened in a task that `close` can end. Raises OSError where that fails."""
        if self._closed:
            raise ConnectionError("the importer is closed")
        if self._connection is not None and self._connection.lost is None:
            return self._connection
        if self._opening is None:
            self._opening = asyncio.get_running_loop().create_task(self._open())
            self._opening.add_done_callback(_note)
        opening = self._opening
        await asyncio.wait({opening})
        if opening.cancelled():
            raise ConnectionError("the importer is closed")
        return opening.result()

    async def close(self) -> None:
        """Idempotent."""
        self._closed = True
        if self._opening is not None:
            self._opening.cancel()
            await asyncio.wait({self._opening})
        if self._connection is not None:
            await self._connection.close("the importer is closed")

    async def _open(self) -> Connection:
        """In place of a connection that was lost, which is gone by then."""
        try:
            async with asyncio.timeout(self._timeout_s):
                if self._connection is not None:
                    await self._connection.close("it is lost")
                self._connection = None
                opened = Connection(await self._connect(), self._tls, self._hello, self._storage)
                try:
                    await opened.welcomed()
                except BaseException:
                    await opened.close("its handshake was not completed")
                    raise
        finally:
            self._opening = None
        self._connection = opened
        return opened

    async def _connect(self) -> socket.socket:
        loop = asyncio.get_running_loop()
        host, port = self._address
        family, kind, protocol, _, address = (await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM))[0]
        sock = socket.socket(family, kind, protocol)
        try:
            tune(sock, self._timeout_s)
            await loop.sock_connect(sock, address)
        except BaseException:
            sock.close()
            raise
        return sock


def _note(opening: asyncio.Task[Connection]) -> None:
    """Whoever waited for it may have given up before it failed: that is no error that nobody handles."""
    if not opening.cancelled():
        opening.exception()
