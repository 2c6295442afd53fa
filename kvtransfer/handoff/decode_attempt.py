"""D's shell: carries out one handoff's instructions over one stream."""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import grpc

from pdserve.core.clock import Clock
from pdserve.core.config import HandoffConfig
from pdserve.core.errors import from_foreign
from pdserve.core.lifecycle import Lifecycle
from pdserve.core.types import (
    BLOCK_TOKENS,
    BlockId,
    HandoffId,
    Incarnation,
    RequestId,
    WorkerId,
    blocks_for,
)
from pdserve.core.worker_record import WorkerRecord
from pdserve.kvtransfer.digest import DIGEST_BYTES, verify
from pdserve.kvtransfer.handoff import events as ev
from pdserve.kvtransfer.handoff import instructions as do
from pdserve.kvtransfer.handoff import wire
from pdserve.kvtransfer.handoff.ask import Committed, HandoffAsk, HandoffPeer, NotServed
from pdserve.kvtransfer.handoff.decode_side import DECODE_TABLE, DecodeHandoff
from pdserve.kvtransfer.handoff.reservations import Reservations
from pdserve.kvtransfer.handoff.shell import Observer, Shell
from pdserve.kvtransfer.handoff.states import Outcome
from pdserve.kvtransfer.pool.pool import KvPool
from pdserve.kvtransfer.pool.storage import KvStorage
from pdserve.kvtransfer.transports.base import Failed, Grant, Importer, Landed, Offer, Segment
from pdserve.proto import handoff_pb2 as pb
from pdserve.proto import handoff_pb2_grpc

_log = logging.getLogger(__name__)


class Importers(Protocol):
    """Who has the importer for a peer; see transports/ladder.py."""

    async def get(
        self, worker: WorkerId, incarnation: Incarnation, offers: Sequence[Offer]
    ) -> Importer | None: ...

    async def close(self) -> None: ...


@dataclass(slots=True)
class DecodeSite:
    """What all handoffs of one decode worker share."""

    record: Callable[[], WorkerRecord]
    """Who this worker is now: its incarnation changes when it is fenced."""
    pool: KvPool
    storage: KvStorage
    importers: Importers
    transports: tuple[str, ...]
    """Those that D accepts, best first."""
    config: HandoffConfig
    progress: Callable[[], int]
    """A counter that moves while this worker gets on."""
    clock: Clock
    observer: Observer | None
    transferred: Callable[[int, float, str], object]
    """Told (bytes, seconds, transport) of every chunk that landed."""
    reservations: Reservations
    counters: Counter[str] = field(default_factory=Counter)
    epochs: int = 0

    @property
    def digest_bytes(self) -> int | None:
        """Bytes of digests per block, None where none are wanted."""
        return self.storage.layout.segments_per_block * DIGEST_BYTES if self.config.digest else None


class DecodeAttempt(Shell[DecodeHandoff, pb.DecodeMessage]):
    """One handoff at D, from Open to the last byte that a transport may write.

    `result` is set as soon as the caller may go on; what a transport still holds is drained behind its back.
    """

    def __init__(self, site: DecodeSite, handoff: HandoffId, ask: HandoffAsk, peer: HandoffPeer) -> None:
        super().__init__(
            DECODE_TABLE,
            DecodeHandoff(ask.positions),
            handoff=handoff,
            request=RequestId(ask.request_id),
            config=site.config,
            clock=site.clock,
            observer=site.observer,
            counters=site.counters,
        )
        self._site = site
        self._ask = ask
        self._peer = peer
        self.result: asyncio.Future[Committed | NotServed] = asyncio.get_running_loop().create_future()
        site.epochs += 1
        self._epoch = site.epochs
        self._opened: wire.OpenedReply | None = None
        self._filled: wire.FilledReply | None = None
        self._filled_seen_at = 0.0
        self._chunks: list[wire.Chunk] = []
        self._importer: Importer | None = None
        self._table: tuple[BlockId, ...] = ()
        self._fetches: set[asyncio.Task[Landed | Failed]] = set()
        self._blocks_moved = 0
        self._bytes_moved = 0

    def start(self, channel: grpc.aio.Channel) -> None:
        """Open the stream and ask."""
        self._start_timers(self._ask.remaining_s)
        self.feed(ev.Started())
        self._spawn(self._converse(channel))

    # The stream

    async def _converse(self, channel: grpc.aio.Channel) -> None:
        call = handoff_pb2_grpc.HandoffStub(channel).Handoff()
        ends = {asyncio.create_task(self._read(call)), asyncio.create_task(self._write(call))}
        await self.over.wait()
        # The peer gets a moment to read the last words; a call that is cancelled at once may lose them.
        await asyncio.wait(ends, timeout=self.config.heartbeat_s)
        call.cancel()
        await asyncio.gather(*ends, return_exceptions=True)

    async def _read(self, call: Any) -> None:
        reason = "P ended the stream"
        try:
            async for message in call:
                self.watch.heard(self.clock.now())
                self._receive(message)
        except grpc.aio.AioRpcError as error:
            reason = f"the stream to {self._peer.endpoint} broke: {error.code().name}: {error.details()}"
        except asyncio.CancelledError:
            reason = "the stream was cancelled"
        self.feed(ev.StreamClosed(reason))

    async def _write(self, call: Any) -> None:
        try:
            while (message := await self.outbox.get()) is not None:
                await call.write(message)
            await call.done_writing()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            # The reader sees the same end of the stream, and says why.
            _log.debug("handoff %s cannot send: %s", self.handoff, error)

    def _receive(self, message: pb.PrefillMessage) -> None:
        """One message of P as one event."""
        try:
            event = self._understand(message)
        except ValueError as error:
            event = ev.Violation(f"P sent what is no message of this protocol: {error}")
        except Exception as error:
            self._defect(error)
            return
        if event is not None:
            self.feed(event)

    def _understand(self, message: pb.PrefillMessage) -> object | None:
        match message.WhichOneof("message"):
            case "opened":
                return self._hear_opened(wire.unpack_opened(message.opened))
            case "rejected":
                return ev.Rejected(*wire.unpack_rejected(message.rejected))
            case "chunk":
                return self._hear_chunk(wire.unpack_chunk(message.chunk, self._site.digest_bytes))
            case "filled":
                return self._hear_filled(wire.unpack_filled(message.filled))
            case "released":
                return ev.Released(wire.unpack_released(message.released))
            case "aborted":
                return ev.PeerAborted(message.aborted.reason)
            case "source_failed":
                return ev.SourceFailed(message.source_failed.seq, message.source_failed.reason)
            case "heartbeat":
                self.watch.progressed(message.heartbeat.progress, self.clock.now())
                return None
        raise ValueError("a message without content")

    def _hear_opened(self, reply: wire.OpenedReply) -> object:
        if reply.incarnation != self._peer.incarnation:
            return ev.Violation(f"P is {reply.incarnation}, asked was {self._peer.incarnation}")
        self._opened = reply
        return ev.Opened()

    def _hear_chunk(self, chunk: wire.Chunk) -> object:
        valid = min(BLOCK_TOKENS, self._ask.positions - BLOCK_TOKENS * (chunk.end - 1))
        if chunk.last_valid_tokens != valid:
            return ev.Violation(f"chunk {chunk.seq} ends in {chunk.last_valid_tokens} tokens, not in {valid}")
        self._chunks.append(chunk)
        return ev.ChunkReady(chunk.seq, chunk.first, chunk.end)

    def _hear_filled(self, reply: wire.FilledReply) -> object:
        self._filled = reply
        self._filled_seen_at = self.clock.now()
        self._observe(Lifecycle.FILLED_SEEN)
        return ev.Filled(reply.chunks, reply.tokens)

    def _heartbeat(self) -> pb.DecodeMessage:
        return wire.pack_decode_heartbeat(self._site.progress() + self.beats)

    def _peer_works(self) -> bool:
        return self._opened is not None and self._filled is None

    def _on_beat(self) -> None:
        if self.machine.wants_memory:
            self._site.reservations.press()

    # Instructions

    def _carry_out(self, instruction: do.Instruction) -> None:
        match instruction:
            case do.SendOpen():
                self._send(wire.pack_open(self._open_request()))
            case do.Connect():
                self._spawn(self._connect())
            case do.Reserve():
                self._reserve()
            case do.SendGrant(seq):
                assert self._importer is not None  # granted only when connected
                self._send(wire.pack_grant(self._grant(seq), self._importer.transport))
            case do.Fetch(seq, rank):
                self._fetch(seq, rank)
            case do.Verify(seq, rank):
                self._spawn(self._check(seq, rank))
            case do.SendRelease():
                self._observe(Lifecycle.VERIFIED)
                self._send(wire.pack_release())
            case do.SendAbort(reason):
                self._send(wire.pack_decode_abort(reason))
            case do.Commit():
                self._commit()
            case do.Quarantine():
                self._site.pool.release(self._ask.owner)
                for task in self._fetches:
                    task.cancel()
            case do.FreeBlocks():
                self._site.pool.release(self._ask.owner)
                self._site.pool.drain(self._ask.owner)
                self.feed(ev.BlocksFreed())
            case do.Finish(outcome, reason, retry_after_s):
                self._finish(NotServed(outcome, reason, retry_after_s))
            case _:
                raise ValueError(f"no instruction of D's: {instruction}")

    def _open_request(self) -> wire.OpenRequest:
        ask, site, record = self._ask, self._site, self._site.record()
        return wire.OpenRequest(
            handoff=self.handoff,
            request=ask.request_id,
            schema=bytes.fromhex(record.schema),
            layout=site.storage.layout,
            token_ids=ask.token_ids[: ask.positions],
            chain=ask.names,
            remaining_s=ask.remaining_s,
            transports=site.transports,
            digest=site.config.digest,
            decode_worker=record.worker,
            decode_incarnation=record.incarnation,
            prefill_incarnation=self._peer.incarnation,
        )

    async def _connect(self) -> None:
        assert self._opened is not None  # asked for by Opened
        try:
            importer = await self._site.importers.get(
                self._peer.worker, self._peer.incarnation, self._opened.offers
            )
        except Exception as error:
            self.feed(ev.ConnectFailed(f"no transport to {self._peer.worker}: {from_foreign(error)}"))
            return
        if importer is None:
            offered = [offer.transport for offer in self._opened.offers]
            self.feed(
                ev.ConnectFailed(
                    f"no transport to {self._peer.worker}: it offers {offered}, "
                    f"accepted are {list(self._site.transports)}, none of them is in reach"
                )
            )
            return
        self._importer = importer
        self.feed(ev.Connected())

    def _reserve(self) -> None:
        """Pin the prefix that is here, take all the rest, or take nothing."""
        pool, ask = self._site.pool, self._ask
        if not self._site.reservations.may_try(self):
            self.feed(ev.ReserveRefused())
            return
        reused = len(pool.acquire_prefix(ask.owner, ask.names))
        if pool.reserve(ask.owner, ask.blocks - reused) is None:
            self._site.reservations.give_back(ask.owner)
            self.counters["reservations_refused"] += 1
            self._site.reservations.wait(self, ask.blocks)
            self.feed(ev.ReserveRefused())
            return
        self._site.reservations.leave(self)
        self._table = pool.table(ask.owner)
        self._observe(Lifecycle.RESERVED, blocks=len(self._table), reused=reused)
        self.feed(ev.BlocksReserved(reused))

    def _grant(self, seq: int) -> Grant:
        chunk, reused = self._chunks[seq], self.machine.reused
        last = blocks_for(self._ask.positions) - 1
        segments = tuple(
            Segment(
                source,
                generation,
                self._table[index],
                chunk.last_valid_tokens if index == last else BLOCK_TOKENS,
            )
            for index, (source, generation) in enumerate(
                zip(chunk.blocks, chunk.generations, strict=True), chunk.first
            )
            if index >= reused
        )
        return Grant(self.handoff, self._epoch, seq, segments)

    def _fetch(self, seq: int, rank: int) -> None:
        assert self._importer is not None  # granted only when connected
        grant = self._grant(seq)
        self._site.pool.start_loading(self._ask.owner, [segment.destination for segment in grant.segments])
        self._fetches.add(
            self._spawn(self._importer.fetch(grant), lambda done: self._fetched(done, seq, rank))
        )

    def _fetched(self, task: "asyncio.Task[Landed | Failed]", seq: int, rank: int) -> None:
        """The transport reported: no late write can follow."""
        self._fetches.discard(task)
        if task.cancelled():
            self.feed(ev.ChunkFailed(seq, rank, "the fetch was called off"))
        elif (error := task.exception()) is not None:
            self.feed(ev.ChunkFailed(seq, rank, f"the transport raised {error!r}"))
        elif isinstance(report := task.result(), Failed):
            self.feed(ev.ChunkFailed(seq, rank, report.reason))
        else:
            self._bytes_moved += report.num_bytes
            if self._importer is not None:
                self._site.transferred(report.num_bytes, report.seconds, self._importer.transport)
            self.feed(ev.ChunkLanded(seq, rank))

    async def _check(self, seq: int, rank: int) -> None:
        """Digests of what landed. The blocks count as loading until they are checked."""
        grant = self._grant(seq)
        try:
            damage = await asyncio.to_thread(self._find_damage, grant, self._chunks[seq])
            if damage is None and not self.over.is_set():
                self._note_landed(grant)
        except Exception as error:
            # The machine waits for this report, whatever happened.
            damage = f"chunk {seq} could not be checked"
            if not self.over.is_set():
                self._defect(error)
        if damage is None:
            self.feed(ev.ChunkVerified(seq, rank))
            return
        if not self.over.is_set():
            self.counters["digest_mismatches"] += 1
            _log.error("handoff %s of request %s: %s", self.handoff, self.request, damage)
        self.feed(ev.ChunkMismatched(seq, rank, damage))

    def _note_landed(self, grant: Grant) -> None:
        self._blocks_moved += len(grant.segments)
        self._site.pool.landed(self._ask.owner, [segment.destination for segment in grant.segments])
        self._observe(Lifecycle.CHUNK_LANDED, seq=grant.seq, blocks=len(grant.segments))

    def _find_damage(self, grant: Grant, chunk: wire.Chunk) -> str | None:
        """In a thread: what is wrong with the landed bytes, None if nothing is."""
        size, digests = self._site.digest_bytes, chunk.digests
        if size is None or digests is None:
            return None
        skipped = len(chunk.blocks) - len(grant.segments)
        for at, segment in enumerate(grant.segments, skipped):
            block = self._site.storage.read_blocks([segment.destination])[0]
            expected = digests[at * size : (at + 1) * size]
            bad = verify(block, self._site.storage.layout, segment.valid_tokens, expected)
            if bad is not None:
                part = "V" if bad.is_value else "K"
                where = f"{part} of layer {bad.layer}, head {bad.head}, block {chunk.first + at}"
                return f"what landed from {self._peer.worker} is damaged: {where} of the prompt"
        return None

    # Endings

    def _commit(self) -> None:
        pool, ask = self._site.pool, self._ask
        pool.commit(ask.owner)
        reused = self.machine.reused
        for block, name in zip(self._table[reused : len(ask.names)], ask.names[reused:], strict=True):
            pool.name(ask.owner, block, name)
        assert self._opened is not None  # VERIFIED comes after all three
        assert self._filled is not None
        assert self._importer is not None
        self.counters["handoffs_committed"] += 1
        self._observe(Lifecycle.COMMITTED, blocks=len(self._table), reused=reused)
        self._finish(
            Committed(
                owner=ask.owner,
                num_computed=ask.positions,
                transport=self._importer.transport,
                blocks_moved=self._blocks_moved,
                bytes_moved=self._bytes_moved,
                blocks_reused=reused,
                prefill_queue_s=self._filled.prefill_queue_s,
                prefill_s=self._filled.prefill_s,
                prefill_cached_tokens=self._filled.cached_tokens,
                filled_seen_at=self._filled_seen_at,
                committed_at=self.clock.now(),
                prefill_worker=self._opened.worker,
                prefill_incarnation=self._opened.incarnation,
                prefill_pid=self._opened.pid,
            )
        )

    def _finish(self, result: Committed | NotServed) -> None:
        if isinstance(result, NotServed):
            self.counters[result.reason.value] += 1
        if not self.result.done():
            self.result.set_result(result)

    def _gave_up(self, state: str) -> None:
        self._site.reservations.leave(self)

    def _defect(self, error: Exception) -> None:
        _log.error(
            "handoff %s of request %s is broken, its story: %s",
            self.handoff,
            self.request,
            self.story,
            exc_info=error,
        )
        self.counters["defects"] += 1
        self._site.reservations.leave(self)
        self._finish(NotServed(Outcome.FAILED, f"a defect of this worker: {from_foreign(error)}"))
        if self.machine.state in ("aborted", "drained"):
            # Blocks that a transport may write stay in quarantine: losing them is better than sharing them.
            self._site.pool.release(self._ask.owner)
            self._break()
        elif not self.machine.terminal:
            self.feed(ev.Cancelled("a defect of D"))
