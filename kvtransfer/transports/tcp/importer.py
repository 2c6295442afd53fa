"""D's half of the tcp transport: one connection, many claims on it, bytes staged before they land."""

import asyncio
import contextlib
import itertools
import secrets
import socket
import ssl
from dataclasses import dataclass

import numpy as np

from pdserve.core.clock import Clock, MonotonicClock
from pdserve.core.errors import Unavailable
from pdserve.kvtransfer.pool.storage import KvStorage
from pdserve.kvtransfer.transports.base import Failed, Grant, Landed, Offer
from pdserve.kvtransfer.transports.copying import CopyThread, refusal, settle
from pdserve.kvtransfer.transports.tcp.stream import Stream, connected
from pdserve.kvtransfer.transports.tcp.wire import (
    FRAME_BYTES,
    MAX_REASON_BYTES,
    TOKEN_BYTES,
    WELCOME_BYTES,
    Claim,
    FrameHeader,
    Hello,
    Welcome,
    WireError,
    receive_exactly,
    tune,
)


@dataclass(slots=True)
class _Pending:
    """One claim that waits for its frame. An outcome of None is: landed; a text: why not."""

    grant: Grant
    outcome: "asyncio.Future[str | None]"
    abandoned: bool = False
    copy: "asyncio.Future[None] | None" = None


class _Connection:
    """A socket whose handshake is done, its reading task, and what waits for frames on it."""

    def __init__(self, stream: Stream, storage: KvStorage, copier: CopyThread) -> None:
        self._stream = stream
        self._storage = storage
        self._copier = copier
        self._tags = itertools.count(1)
        self._pending: dict[int, _Pending] = {}
        self._staging = np.empty(0, np.uint8)
        self._send_lock = asyncio.Lock()
        self.lost: str | None = None
        self._task = asyncio.get_running_loop().create_task(self._read())

    async def claim(self, grant: Grant) -> _Pending:
        """Ask for a grant's bytes. The caller waits for the outcome or abandons it."""
        tag = next(self._tags)
        data = Claim(tag, grant.handoff, grant.epoch, grant.seq).pack()
        async with self._send_lock:
            if self.lost is not None:
                raise ConnectionError(self.lost)
            pending = _Pending(grant, asyncio.get_running_loop().create_future())
            self._pending[tag] = pending
            try:
                await self._stream.send(data)
            except BaseException:
                # Half a claim may be out: nothing sensible can follow it on this socket.
                pending.abandoned = True
                self.sever("a claim could not be sent")
                raise
        return pending

    async def abandon(self, pending: _Pending) -> None:
        """No write for this claim begins from now on, and one that has begun is over when this returns."""
        pending.abandoned = True
        if pending.copy is not None:
            await settle(pending.copy)

    def sever(self, reason: str) -> None:
        self.lost = self.lost or reason
        self._stream.sever()

    async def close(self, reason: str) -> None:
        """Outstanding claims fail with `reason`; copies that run are waited for."""
        self.sever(reason)
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _read(self) -> None:
        """Take frames until the connection ends, then fail what is left and close the socket."""
        try:
            while True:
                await self._read_frame()
        except OSError as error:
            self.sever(f"the connection was lost: {error}")
        finally:
            self.sever("the importer is closed")
            for pending in self._pending.values():
                if not pending.outcome.done():
                    pending.outcome.set_result(self.lost)
            self._pending.clear()
            async with self._send_lock:
                self._stream.close()

    async def _read_frame(self) -> None:
        head = bytearray(FRAME_BYTES)
        await receive_exactly(self._stream, memoryview(head))
        header = FrameHeader.unpack(head)
        pending = self._pending.get(header.tag)
        if pending is None or (header.epoch, header.seq) != (pending.grant.epoch, pending.grant.seq):
            raise WireError(f"a frame answers no claim of this reader: {header}")
        blocks = len(pending.grant.segments)
        expected = blocks * self._storage.layout.block_bytes
        if header.num_bytes != expected if not header.failed else header.num_bytes > MAX_REASON_BYTES:
            raise WireError(f"a frame has {header.num_bytes} bytes, the grant has {expected}")
        if self._staging.size < header.num_bytes:
            self._staging = np.empty(header.num_bytes, np.uint8)
        staged = self._staging[: header.num_bytes]
        await receive_exactly(self._stream, staged.data)
        reason: str | None = None
        if header.failed:
            reason = staged.tobytes().decode(errors="replace") or "the source failed"
        elif blocks and not pending.abandoned:
            rows = staged.reshape(blocks, -1)
            destinations = [segment.destination for segment in pending.grant.segments]
            pending.copy = self._copier.submit(lambda: self._storage.write_blocks(destinations, rows))
            await settle(pending.copy)
            if (error := pending.copy.exception()) is not None:
                reason = f"the blocks could not be written: {type(error).__name__}: {error}"
        del self._pending[header.tag]
        if not pending.outcome.done():
            pending.outcome.set_result(reason)


class TcpImporter:
    """Fetches from one exporter. Connects to warm up or to fetch, and again after a connection was lost."""

    transport = "tcp"

    def __init__(
        self,
        storage: KvStorage,
        offer: Offer,
        *,
        timeout_s: float = 10.0,
        clock: Clock | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """`timeout_s` bounds a whole fetch. With `tls`, the exporter must show a certificate that it accepts.

        Raises Unavailable for an offer that cannot be understood.
        """
        parameters = offer.parameters
        try:
            self._address = (parameters["host"], int(parameters["port"]))
            self._token = bytes.fromhex(parameters["token"])
            layout = bytes.fromhex(parameters["layout"])
        except (KeyError, ValueError) as error:
            raise Unavailable(f"a tcp offer is not understood: {type(error).__name__}: {error}") from error
        if len(self._token) != TOKEN_BYTES or layout != storage.layout.fingerprint():
            raise Unavailable("the offered pool has another block layout; use a transport that converts")
        self._storage = storage
        self._timeout_s = timeout_s
        self._tls = tls
        self._clock = clock or MonotonicClock()
        self._reader = secrets.token_bytes(TOKEN_BYTES)
        self._copier = CopyThread("kv-tcp-in")
        self._opening: asyncio.Task[_Connection] | None = None
        self._closed = False

    async def warm_up(self) -> None:
        """Connect. Raises OSError (a timeout is one) where that fails."""
        await self._connected()

    async def fetch(self, grant: Grant) -> Landed | Failed:
        started = self._clock.now()
        reason = refusal(
            grant,
            sources=None,
            destinations=self._storage.num_blocks,
            block_tokens=self._storage.layout.block_tokens,
        )
        if reason is None:
            try:
                async with asyncio.timeout(self._timeout_s):
                    reason = await self._fetch(grant)
            except TimeoutError:
                reason = f"nothing complete arrived within {self._timeout_s} s"
            except OSError as error:
                reason = f"the source was lost: {error}"
        if reason is not None:
            return Failed(grant.handoff, grant.epoch, grant.seq, reason)
        num_bytes = len(grant.segments) * self._storage.layout.block_bytes
        return Landed(grant.handoff, grant.epoch, grant.seq, num_bytes, self._clock.now() - started)

    async def close(self) -> None:
        """Idempotent."""
        self._closed = True
        if self._opening is not None:
            self._opening.cancel()
            opened = await asyncio.gather(self._opening, return_exceptions=True)
            if isinstance(opened[0], _Connection):
                await opened[0].close("the importer is closed")
        self._copier.close()

    async def _fetch(self, grant: Grant) -> str | None:
        """Why the bytes must not be used, None if they landed."""
        connection = await self._connected()
        pending = await connection.claim(grant)
        try:
            return await pending.outcome
        finally:
            await connection.abandon(pending)

    async def _connected(self) -> _Connection:
        """The connection, opened by whoever needs it first, in a task that `close` can end."""
        if self._closed:
            raise ConnectionError("the importer is closed")
        if self._opening is None or _is_over(self._opening):
            self._opening = asyncio.get_running_loop().create_task(self._open())
        opening = self._opening
        await asyncio.wait({opening})
        if opening.cancelled():
            raise ConnectionError("the importer is closed")
        return opening.result()

    async def _open(self) -> _Connection:
        async with asyncio.timeout(self._timeout_s):
            return _Connection(await self._connect(), self._storage, self._copier)

    async def _connect(self) -> Stream:
        """A connection that the exporter has welcomed."""
        loop = asyncio.get_running_loop()
        host, port = self._address
        family, kind, protocol, _, address = (await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM))[0]
        sock = socket.socket(family, kind, protocol)
        with contextlib.ExitStack() as stack:
            stack.callback(sock.close)
            tune(sock, self._timeout_s)
            await loop.sock_connect(sock, address)
            stream = await connected(sock, self._tls)
            await stream.send(Hello(self._token, self._reader).pack())
            data = bytearray(WELCOME_BYTES)
            await receive_exactly(stream, memoryview(data))
            if not Welcome.unpack(data).accepted:
                raise ConnectionError("the source refused this reader's token")
            stack.pop_all()
        return stream


def _is_over(opening: "asyncio.Task[_Connection]") -> bool:
    """Whether that attempt, or the connection that it made, is of no more use."""
    if not opening.done():
        return False
    return opening.cancelled() or opening.exception() is not None or opening.result().lost is not None
