"""P's half of the nccl transport: packs what is granted and claimed, and sends it when D posts."""

import asyncio
import contextlib
import hmac
import logging
import secrets
import socket
from collections import OrderedDict
from collections.abc import Coroutine
from typing import Any, NamedTuple

from pdserve.core.clock import Clock, MonotonicClock
from pdserve.core.errors import Unavailable
from pdserve.core.types import HandoffId
from pdserve.kvtransfer.gpu.base import Communicators
from pdserve.kvtransfer.pool.storage import KvStorage
from pdserve.kvtransfer.transports.base import Failed, Grant, Offer, SourceDone
from pdserve.kvtransfer.transports.copying import refusal
from pdserve.kvtransfer.transports.meetings import Key, Meetings
from pdserve.kvtransfer.transports.nccl.link import Link
from pdserve.kvtransfer.transports.nccl.reader import Reader
from pdserve.kvtransfer.transports.nccl.stream import ControlStream
from pdserve.kvtransfer.transports.nccl.wire import (
    TOKEN_BYTES,
    VISIT,
    Claim,
    Hello,
    Post,
    Ready,
    Welcome,
    receive_hello,
    receive_join,
    receive_request,
)
from pdserve.kvtransfer.transports.tcp.wire import peer_of, tune

_log = logging.getLogger(__name__)

_ACCEPT_PAUSE_S = 0.1
"""Wait after a failed accept (out of descriptors, as a rule) before the next."""

MAX_PAIRS = 16
"""Communicators kept at once: each takes tens of megabytes of device memory. The longest unused is closed."""


class _Arrival(NamedTuple):
    """A claim, and the reader to answer."""

    reader: Reader
    claim: Claim


class NcclExporter:
    """Sends blocks to readers that hold the offer's token and claim a grant that is being served."""

    transport = "nccl"

    def __init__(
        self,
        storage: KvStorage,
        host: str = "127.0.0.1",
        *,
        advertise: str | None = None,
        timeout_s: float = 10.0,
        clock: Clock | None = None,
        max_pairs: int = MAX_PAIRS,
    ) -> None:
        """`host` to listen on; `advertise`, where that is no address for readers.

        `timeout_s` bounds each serve, each claim's wait, each handshake and all that is under way on a
        communicator. Raises Unavailable for a pool that is not on a GPU, or without NCCL.
        """
        blocks = storage.blocks_on_gpu
        if blocks is None:
            raise Unavailable(f"nccl exports an open pool on a GPU, this one is on {storage.device}")
        self._communicators: Communicators = blocks.gpu.communicators()
        self._blocks = blocks
        self._storage = storage
        self._host = host
        self._advertise = advertise or host
        self._timeout_s = timeout_s
        self._clock = clock or MonotonicClock()
        self._max_pairs = max_pairs
        self._token = secrets.token_bytes(TOKEN_BYTES)
        self._listener: socket.socket | None = None
        self._meetings: Meetings[_Arrival] = Meetings(timeout_s, self._refuse)
        self._readers: OrderedDict[Reader, None] = OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    async def start(self) -> None:
        """Listen. Raises OSError where the address cannot be had."""
        found = await asyncio.get_running_loop().getaddrinfo(self._host, 0, type=socket.SOCK_STREAM)
        self._listener = socket.create_server(found[0][4][:2], family=found[0][0], backlog=128)
        self._listener.setblocking(False)
        self._spawn(self._accept(self._listener))

    def offer(self) -> Offer:
        """Only after `start`."""
        if self._listener is None:
            raise RuntimeError("an NcclExporter has an offer only between start and close")
        return Offer(
            self.transport,
            {
                "host": self._advertise,
                "port": str(self._listener.getsockname()[1]),
                "token": self._token.hex(),
                "num_blocks": str(self._storage.num_blocks),
                "layout": self._storage.layout.fingerprint().hex(),
            },
        )

    async def serve(self, grant: Grant) -> SourceDone | Failed:
        """Wait for the claim, pack, and send when D posts; all within the timeout."""
        key = Key(grant.handoff, grant.epoch, grant.seq)
        reason = refusal(
            grant,
            sources=self._storage.num_blocks,
            destinations=None,
            block_tokens=self._storage.layout.block_tokens,
        )
        if self._closed or reason is not None:
            return Failed(grant.handoff, grant.epoch, grant.seq, reason or "the exporter is closed")
        claimed = False
        try:
            async with asyncio.timeout(self._timeout_s):
                met = await self._meetings.serve(key)
                claimed = isinstance(met, _Arrival)
                reason = await self._send(met, grant) if isinstance(met, _Arrival) else met
        except TimeoutError:
            how = "claimed, but not sent" if claimed else "not claimed by its reader"
            reason = f"{how} within {self._timeout_s} s"
        except OSError as error:
            reason = f"the reader was lost: {error}"
        if reason is not None:
            return Failed(grant.handoff, grant.epoch, grant.seq, reason)
        return SourceDone(grant.handoff, grant.epoch, grant.seq)

    def forget(self, handoff: HandoffId) -> None:
        """Serves that wait report Failed, claims that wait are answered so."""
        self._meetings.call_off("the handoff has ended", handoff)

    async def close(self) -> None:
        """Idempotent. Readers lose their epochs, waiting serves report Failed."""
        if self._closed:
            return
        self._closed = True
        self._meetings.call_off("the exporter is closed")
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    # Readers

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                sock, _ = await asyncio.get_running_loop().sock_accept(listener)
            except OSError as error:
                _log.warning("kv transfer: cannot accept a reader: %s", error)
                await asyncio.sleep(_ACCEPT_PAUSE_S)
                continue
            self._spawn(self._attend(sock))

    async def _attend(self, sock: socket.socket) -> None:
        """One reader, from its hello to the end of its epoch."""
        stream = ControlStream(sock)
        try:
            tune(sock, self._timeout_s)
            async with asyncio.timeout(self._timeout_s):
                hello = await self._greet(stream)
                if hello.epoch == VISIT:
                    sock.close()
                    return
                unique_id = (await receive_join(stream)).unique_id
        except OSError as error:
            _log.warning("kv transfer: a reader at %s is refused: %s", peer_of(sock), error)
            sock.close()
            return
        except BaseException:
            sock.close()
            raise
        gpu, clock = self._blocks.gpu, self._clock
        link = Link("kv-nccl-out", stream, gpu, self._communicators, clock, self._timeout_s)
        reader = Reader(link)
        over = asyncio.Event()

        def ended(reason: str) -> None:
            _log.info("kv transfer: epoch %d of a reader is over: %s", hello.epoch, reason)
            reader.ended(reason)
            over.set()

        self._admit(reader)
        link.start(unique_id, 1, lambda stream: self._read(reader, stream), ended)
        try:
            await over.wait()
        finally:
            self._readers.pop(reader, None)
            await link.close("the exporter is closed")

    async def _greet(self, stream: ControlStream) -> Hello:
        hello = await receive_hello(stream)
        refused, own = "", self._communicators.version
        if not hmac.compare_digest(hello.token, self._token):
            refused = "its token is not this exporter's"
        elif hello.nccl_version != own:
            refused = f"its NCCL is {hello.nccl_version}, here it is {own}"
        await stream.send(Welcome(refused).pack())
        if refused:
            raise ConnectionError(refused)
        return hello

    def _admit(self, reader: Reader) -> None:
        """Keep it, and make room: the longest unused of the others that are idle."""
        self._readers[reader] = None
        spare = [other for other in self._readers if other is not reader and not other.lock.locked()]
        for other in spare[: max(0, len(self._readers) - self._max_pairs)]:
            other.link.end("it made room for another reader")
            del self._readers[other]

    async def _read(self, reader: Reader, stream: ControlStream) -> None:
        while True:
            request = await receive_request(stream)
            if isinstance(request, Post):
                reader.posted(request)
                continue
            if reader in self._readers:
                self._readers.move_to_end(reader)
            key = Key(request.handoff, request.epoch, request.seq)
            self._meetings.claimed(key, _Arrival(reader, request))

    # Grants

    def _refuse(self, arrival: _Arrival, reason: str) -> None:
        self._spawn(self._send_refusal(arrival, reason))

    async def _send_refusal(self, arrival: _Arrival, reason: str) -> None:
        with contextlib.suppress(OSError):
            async with asyncio.timeout(self._timeout_s):
                await arrival.reader.link.send(Ready(arrival.claim.tag, 0, reason).pack())

    async def _send(self, arrival: _Arrival, grant: Grant) -> str | None:
        """Pack and send the granted blocks; why they were refused, None if they were sent."""
        reader, tag = arrival.reader, arrival.claim.tag
        async with reader.lock:
            if not grant.segments:
                await reader.link.send(Ready(tag, 0).pack())
                return None
            reason = await reader.link.in_thread(lambda: self._pack(reader, grant))
            if reason is not None:
                await reader.link.send(Ready(tag, 0, reason).pack())
                return reason
            size = len(grant.segments) * self._blocks.rows.row_bytes
            if not await reader.offer(Ready(tag, size)):
                return "the reader does not want it any more"
            await reader.link.in_thread(lambda: self._post(reader, grant))
        return None

    def _pack(self, reader: Reader, grant: Grant) -> str | None:
        """In the link's thread: the granted bytes, checked before and after, to staging memory."""
        epoch, blocks, generations = reader.link.epoch, self._blocks, self._storage.generations
        if (reason := grant.table.stale(generations)) is not None:
            return reason
        packed = epoch.staged(len(grant.segments), blocks.rows.row_bytes)
        blocks.gather(epoch.stream, [segment.source for segment in grant.segments], packed)
        epoch.stream.record().wait()
        return grant.table.stale(generations)

    def _post(self, reader: Reader, grant: Grant) -> None:
        """In the link's thread: what was packed last."""
        epoch = reader.link.epoch
        epoch.send(epoch.staged(len(grant.segments), self._blocks.rows.row_bytes))
