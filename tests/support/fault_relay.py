"""The link between D and P where it is a socket: a relay that can be slow, or change a byte."""

import asyncio
import contextlib
import dataclasses

from fault_points import LinkState

from pdserve.kvtransfer.transports.base import Offer

_PIECE_BYTES = 16 * 1024
"""Passed on at once: short beside a chunk, so that a slow link is slow within chunks, too."""


class Relays:
    """One listening socket per address behind it, in D's process. Passes bytes on at the link's pace."""

    def __init__(self, link: LinkState) -> None:
        self._link = link
        self._servers: dict[tuple[str, int], asyncio.Server] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def around(self, offer: Offer) -> Offer:
        """The same offer, where it is tcp's by way of a relay."""
        if offer.transport != "tcp":
            return offer
        behind = offer.parameters["host"], int(offer.parameters["port"])
        if behind not in self._servers:
            self._servers[behind] = await asyncio.start_server(
                lambda reader, writer: self._attend(reader, writer, behind), "127.0.0.1", 0
            )
        port = self._servers[behind].sockets[0].getsockname()[1]
        here = {"host": "127.0.0.1", "port": str(port)}
        return dataclasses.replace(offer, parameters={**offer.parameters, **here})

    async def close(self) -> None:
        for server in self._servers.values():
            server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _attend(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, behind: tuple[str, int]
    ) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        with contextlib.suppress(OSError):
            source, asked = await asyncio.open_connection(*behind)
            try:
                await asyncio.gather(self._pass_on(reader, asked, False), self._pass_on(source, writer, True))
            finally:
                asked.close()
        writer.close()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, to_d: bool) -> None:
        while piece := await reader.read(_PIECE_BYTES):
            await self._link.take(len(piece))
            writer.write(self._damaged(piece) if to_d else piece)
            await writer.drain()
        writer.write_eof()

    def _damaged(self, piece: bytes) -> bytes:
        at = self._link.flip_at
        if at is None:
            return piece
        if at >= len(piece):
            self._link.flip_at = at - len(piece)
            return piece
        self._link.flip_at = None
        return piece[:at] + bytes([piece[at] ^ 1]) + piece[at + 1 :]
