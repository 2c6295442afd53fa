"""D's half of the nccl transport: one epoch after the other, each begun by a fetch and closed when idle."""

import asyncio
import contextlib
import socket
from collections.abc import Coroutine
from typing import Any

from pdserve.core.clock import Clock, MonotonicClock
from pdserve.core.errors import Unavailable
from pdserve.kvtransfer.gpu.base import Communicators
from pdserve.kvtransfer.pool.storage import KvStorage
from pdserve.kvtransfer.transports.base import Failed, Grant, Landed, Offer
from pdserve.kvtransfer.transports.copying import refusal
from pdserve.kvtransfer.transports.nccl.connection import Connection
from pdserve.kvtransfer.transports.nccl.link import Link
from pdserve.kvtransfer.transports.nccl.stream import ControlStream
from pdserve.kvtransfer.transports.nccl.wire import (
    TOKEN_BYTES,
    VISIT,
    Hello,
    Join,
    receive_welcome,
)
from pdserve.kvtransfer.transports.tcp.wire import tune

IDLE_S = 60.0
"""A communicator that is not used for so long is closed: it holds device memory at both ends."""


class NcclImporter:
    """One peer, joined by the first fetch, and again by the next one whenever that was lost or idle."""

    transport = "nccl"

    def __init__(
        self,
        storage: KvStorage,
        offer: Offer,
        *,
        timeout_s: float = 10.0,
        clock: Clock | None = None,
        idle_s: float = IDLE_S,
    ) -> None:
        """Raises Unavailable for an offer of another layout, or where this worker has no NCCL."""
        blocks, parameters = storage.blocks_on_gpu, offer.parameters
        if blocks is None:
            raise Unavailable(f"nccl lands on a GPU, this pool is on {storage.device}")
        try:
            self._address = (parameters["host"], int(parameters["port"]))
            self._token = bytes.fromhex(parameters["token"])
            layout = bytes.fromhex(parameters["layout"])
        except (KeyError, ValueError) as error:
            raise Unavailable(f"an nccl offer is not understood: {type(error).__name__}: {error}") from error
        if len(self._token) != TOKEN_BYTES or layout != storage.layout.fingerprint():
            raise Unavailable("the offered pool has another block layout; use a transport that converts")
        self._communicators: Communicators = blocks.gpu.communicators()
        self._blocks = blocks
        self._block_tokens = storage.layout.block_tokens
        self._timeout_s = timeout_s
        self._idle_s = idle_s
        self._clock = clock or MonotonicClock()
        self._connection: Connection | None = None
        self._opening: asyncio.Task[Connection] | None = None
        self._idle_timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._epochs = 0
        self._closed = False

    @property
    def epochs(self) -> int:
        """How many communicators were begun for the pair, since the start."""
        return self._epochs

    async def warm_up(self) -> None:
        """Ask P whether this reader would be welcome. Raises OSError (a timeout is one) where it is not.

        The communicator is for the first fetch: it holds device memory at both ends.
        """
        async with asyncio.timeout(self._timeout_s):
            stream = await self._greet(VISIT)
        stream.close()

    async def fetch(self, grant: Grant) -> Landed | Failed:
        started, rows = self._clock.now(), self._blocks.rows
        reason = refusal(grant, sources=None, destinations=rows.num_rows, block_tokens=self._block_tokens)
        if reason is None:
            try:
                async with asyncio.timeout(self._timeout_s):
                    reason = await self._fetch(grant)
            except TimeoutError:
                reason = f"nothing complete arrived within {self._timeout_s} s"
            except OSError as error:
                reason = f"the source was lost: {error}"
            self._watch_idleness()
        if reason is not None:
            return Failed(grant.handoff, grant.epoch, grant.seq, reason)
        num_bytes = len(grant.segments) * rows.row_bytes
        return Landed(grant.handoff, grant.epoch, grant.seq, num_bytes, self._clock.now() - started)

    async def close(self) -> None:
        """Idempotent. Fetches that wait fail, writes that have begun are over when this returns."""
        self._closed = True
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        if self._opening is not None:
            self._opening.cancel()
            await asyncio.gather(self._opening, return_exceptions=True)
        if self._connection is not None:
            await self._connection.close("the importer is closed")
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _fetch(self, grant: Grant) -> str | None:
        """Why the blocks must not be used, None if they landed."""
        connection = await self._connected()
        pending = await connection.claim(grant)
        try:
            return await pending.outcome
        finally:
            await connection.abandon(pending)

    async def _connected(self) -> Connection:
        """The connection, opened by whoever needs it first, in a task that `close` can end."""
        if self._closed:
            raise ConnectionError("the importer is closed")
        if self._connection is not None and self._connection.lost is None:
            return self._connection
        if self._opening is None or self._opening.done():
            self._opening = asyncio.get_running_loop().create_task(self._open())
        opening = self._opening
        await asyncio.wait({opening})
        if opening.cancelled():
            raise ConnectionError("the importer is closed")
        return opening.result()

    async def _open(self) -> Connection:
        """A new epoch; the one before has ended at this side by then."""
        if self._connection is not None:
            await self._connection.close("its epoch is over")
            self._connection = None
        self._epochs += 1
        async with asyncio.timeout(self._timeout_s):
            stream, unique_id = await self._connect()
        gpu, clock = self._blocks.gpu, self._clock
        link = Link("kv-nccl-in", stream, gpu, self._communicators, clock, self._timeout_s)
        connection = Connection(link, self._blocks, unique_id)
        try:
            await connection.joined()
        except BaseException:
            await connection.close("it was given up before the peer joined")
            raise
        self._connection = connection
        self._watch_idleness()  # also where nobody waits for it any more
        return connection

    async def _connect(self) -> tuple[ControlStream, bytes]:
        """A socket on which P has welcomed this epoch, and the name under which both join."""
        with contextlib.ExitStack() as stack:
            stream = await self._greet(self._epochs)
            stack.callback(stream.close)
            # Only now: NCCL keeps a thread for every name under which two have not met.
            try:
                unique_id = await asyncio.to_thread(self._communicators.unique_id)
            except RuntimeError as error:
                raise ConnectionError(str(error)) from error
            await stream.send(Join(unique_id).pack())
            stack.pop_all()
        return stream, unique_id

    async def _greet(self, epoch: int) -> ControlStream:
        """A new socket, on which P has said welcome. The caller closes it."""
        loop = asyncio.get_running_loop()
        host, port = self._address
        family, kind, protocol, _, address = (await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM))[0]
        sock = socket.socket(family, kind, protocol)
        with contextlib.ExitStack() as stack:
            stack.callback(sock.close)
            tune(sock, self._timeout_s)
            await loop.sock_connect(sock, address)
            stream = ControlStream(sock)
            await stream.send(Hello(self._token, epoch, self._communicators.version).pack())
            welcome = await receive_welcome(stream)
            if welcome.refused:
                raise ConnectionError(f"the source refused this reader: {welcome.refused}")
            stack.pop_all()
        return stream

    def _watch_idleness(self) -> None:
        """Close the communicator `idle_s` after the last use, if there is none by then."""
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        if not self._closed:
            self._idle_timer = asyncio.get_running_loop().call_later(self._idle_s, self._close_idle)

    def _close_idle(self) -> None:
        if self._connection is not None and self._connection.idle:
            self._spawn(self._connection.close("it was idle"))
        else:
            self._watch_idleness()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
