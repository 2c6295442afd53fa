"""D's shell: carries out one handoff's instructions over one stream."""

import asyncio
import logging
from typing import Any

import grpc

from pdserve.core.errors import from_foreign
from pdserve.core.lifecycle import Lifecycle
from pdserve.core.tasks import end_task
from pdserve.core.types import HandoffId, RequestId
from pdserve.kvtransfer.handoff import events as ev
from pdserve.kvtransfer.handoff import instructions as do
from pdserve.kvtransfer.handoff import wire
from pdserve.kvtransfer.handoff.ask import Committed, HandoffAsk, HandoffPeer, NotServed
from pdserve.kvtransfer.handoff.decode_side import DECODE_TABLE, DecodeHandoff
from pdserve.kvtransfer.handoff.decode_site import DecodeSite
from pdserve.kvtransfer.handoff.heard import Heard
from pdserve.kvtransfer.handoff.landing import Landing
from pdserve.kvtransfer.handoff.messages import OpenRequest
from pdserve.kvtransfer.handoff.patience import Patience
from pdserve.kvtransfer.handoff.shell import Shell
from pdserve.kvtransfer.handoff.state_deadlines import StateBound
from pdserve.kvtransfer.handoff.states import DecodeState, Outcome
from pdserve.kvtransfer.transports.base import Failed, Grant, Importer, Landed
from pdserve.proto import handoff_pb2 as pb
from pdserve.proto import handoff_pb2_grpc

_log = logging.getLogger(__name__)


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
        self.peer = peer
        self.result: asyncio.Future[Committed | NotServed] = asyncio.get_running_loop().create_future()
        self._heard = Heard(peer, ask.positions, site.digest_bytes)
        self._patience = Patience(site, ask, self)
        self._importer: Importer | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._landing: Landing | None = None
        self._fetches: dict[ev.Part, asyncio.Task[Landed | Failed]] = {}
        self._blocks_moved = 0
        self._bytes_moved = 0
        self._digests: dict[ev.Part, bytes | None] = {}

    def start(self, channel: grpc.aio.Channel) -> None:
        """Open the stream and ask; nothing, where the caller gave up before."""
        if self.ended.is_set():
            return
        if not self._ask.held_only:  # which takes blocks at once or never
            self._site.reservations.expect(self, self._ask.blocks)
        self._start_timers()
        self.feed(ev.Started())
        self._spawn(self._converse(channel))

    # The stream

    async def _converse(self, channel: grpc.aio.Channel) -> None:
        call = handoff_pb2_grpc.HandoffStub(channel).Handoff()
        reader, writer = asyncio.create_task(self._read(call)), asyncio.create_task(self._write(call))
        await self.over.wait()
        # The peer gets a moment to read the last words; a call that is cancelled at once may lose them.
        await asyncio.wait({reader, writer}, timeout=self.config.heartbeat_s)
        call.cancel()
        # Not with the call: a write that waits for its connection would wait for ever.
        await end_task(writer)
        await asyncio.gather(reader, return_exceptions=True)

    async def _read(self, call: Any) -> None:
        reason = "P ended the stream"
        try:
            async for message in call:
                self.watch.heard(self.clock.now())
                self._receive(message)
        except grpc.aio.AioRpcError as error:
            reason = f"the stream to {self.peer.endpoint} broke: {error.code().name}: {error.details()}"
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
        """One message of P as one event; heartbeats are none. What comes behind the end is not read."""
        if self.over.is_set():
            return
        if message.WhichOneof("message") == "heartbeat":
            self.watch.progressed(message.heartbeat.progress, self.clock.now())
            return
        try:
            event = self._understand(message)
        except ValueError as error:
            event = ev.Violation(f"P sent what is no message of this protocol: {error}")
        except Exception as error:
            self._defect(error)
            return
        self.feed(event)
        if self._site.reservations.is_deferred(self) and not self._patience.holds_back(self._transport):
            self.feed(ev.MemoryFreed())

    def _understand(self, message: pb.PrefillMessage) -> object:
        now = self.clock.now()
        event = self._heard.hear(message, now)
        match event:
            case ev.Opened():
                self._patience.opened(now, message.opened.estimate_s, message.opened.cached_blocks)
            case ev.ChunkReady(end=end):
                self._patience.announced(now, end)
            case ev.Filled():
                self._patience.filled(now)
                self._observe(Lifecycle.FILLED_SEEN)
        return event

    def _heartbeat(self) -> pb.DecodeMessage:
        return wire.pack_decode_heartbeat(self._site.progress() + self.beats)

    def _bound(self) -> StateBound:
        return self._patience.bound(self.machine, self._entered_at, self._transport)

    def _peer_works(self) -> bool:
        return self._heard.working

    def _on_beat(self) -> None:
        if self.machine.wants_memory:
            self._site.reservations.press()

    # Instructions

    def _carry_out(self, instruction: do.Instruction) -> None:
        match instruction:
            case do.SendOpen():
                self._send(wire.pack_open(self._open_request()))
            case do.Connect():
                self._connecting = self._spawn(self._connect())
            case do.Reserve():
                self._reserve()
            case do.SendGrant(seq):
                assert self._importer is not None  # granted only when connected
                self._send(wire.pack_grant(self._grant_of(seq), self._importer.transport))
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
                for task in self._fetches.values():
                    task.cancel()
            case do.FreeBlocks():
                self._site.pool.release(self._ask.owner)
                self._site.pool.drain(self._ask.owner)
                self.feed(ev.BlocksFreed())
            case do.Finish(outcome, reason, retry_after_s):
                rejection = self._heard.rejection
                held = None if rejection is None else rejection.held_blocks
                self._finish(NotServed(outcome, reason, retry_after_s, held))
            case _:
                raise ValueError(f"no instruction of D's: {instruction}")

    @property
    def _transport(self) -> str | None:
        return None if self._importer is None else self._importer.transport

    def _open_request(self) -> OpenRequest:
        ask, site, record = self._ask, self._site, self._site.record()
        return OpenRequest(
            handoff=self.handoff,
            request=ask.request_id,
            schema=bytes.fromhex(record.schema),
            layout=site.storage.layout,
            token_ids=ask.token_ids[: ask.positions],
            chain=ask.names,
            remaining_s=self._patience.longest_s(),
            transports=site.transports,
            digest=site.config.digest,
            decode_worker=record.worker,
            decode_incarnation=record.incarnation,
            prefill_incarnation=self.peer.incarnation,
            prefix=ask.prefix,
            held_only=ask.held_only,
        )

    async def _connect(self) -> None:
        assert self._heard.opened is not None  # asked for by Opened
        offers = self._heard.opened.offers
        try:
            importer = await self._site.importers.get(self.peer.worker, self.peer.incarnation, offers)
        except Exception as error:
            self.feed(ev.ConnectFailed(f"no transport to {self.peer.worker}: {from_foreign(error)}"))
            return
        if importer is None:
            offered = [offer.transport for offer in offers]
            self.feed(
                ev.ConnectFailed(
                    f"no transport to {self.peer.worker}: it offers {offered}, "
                    f"accepted are {list(self._site.transports)}, none of them is in reach"
                )
            )
            return
        self._importer = importer
        self.feed(ev.Connected())

    # Memory

    def _reserve(self) -> None:
        """Pin the prefix that is here and take all the rest; or take nothing, and ask again."""
        site, ask = self._site, self._ask
        if ask.held_only:
            self._reserve_at_once()
            return
        if self._patience.holds_back(self._transport) or not site.reservations.may_try(self):
            self.feed(ev.ReserveRefused())
            return
        reused = site.pool.acquire(ask.owner, ask.names, ask.blocks, reserve=True)
        if reused is None:
            self.counters["reservations_refused"] += 1
            site.reservations.wait(self, ask.blocks)
            self.feed(ev.ReserveRefused())
            return
        site.reservations.leave(self)
        self._reserved(reused)

    def _reserve_at_once(self) -> None:
        """A prefix fetch never waits: it has its blocks now, overtaking nobody, or it is over."""
        pool, ask = self._site.pool, self._ask
        reused = None
        if self._site.reservations.may_take(ask.blocks):
            reused = pool.acquire(ask.owner, ask.names, ask.blocks, reserve=True)
        if reused is None:
            self.counters["reservations_refused"] += 1
            self.feed(ev.ReserveRefused())
            missing = ask.blocks - pool.match(ask.names)
            self.feed(ev.Cancelled(f"no {missing} blocks are to be had now, and a prefix fetch never waits"))
            return
        self._reserved(reused)

    def _reserved(self, reused: int) -> None:
        site, ask = self._site, self._ask
        site.epochs += 1
        table = site.pool.table(ask.owner)
        self._landing = Landing(self.handoff, site.epochs, ask.positions, table, reused, site.storage)
        self._observe(Lifecycle.RESERVED, blocks=len(table), reused=reused)
        self.feed(ev.BlocksReserved(reused))

    # Copies

    def _grant_of(self, seq: int) -> Grant:
        assert self._landing is not None  # granted only when reserved
        return self._landing.grant(self._heard.chunks[seq])

    def _fetch(self, seq: int, rank: int) -> None:
        assert self._importer is not None  # granted only when connected
        grant = self._grant_of(seq)
        self._site.pool.start_loading(self._ask.owner, [segment.destination for segment in grant.segments])
        self._fetches[seq, rank] = self._spawn(
            self._importer.fetch(grant), lambda done: self._fetched(done, seq, rank)
        )

    def _fetched(self, task: "asyncio.Task[Landed | Failed]", seq: int, rank: int) -> None:
        """The transport reported: no late write can follow."""
        del self._fetches[seq, rank]
        if task.cancelled():
            self.feed(ev.ChunkFailed(seq, rank, "the fetch was called off"))
        elif (error := task.exception()) is not None:
            self.feed(ev.ChunkFailed(seq, rank, f"the transport raised {error!r}"))
        elif isinstance(report := task.result(), Failed):
            self.feed(ev.ChunkFailed(seq, rank, report.reason))
        else:
            self._bytes_moved += report.num_bytes
            self._digests[seq, rank] = report.digests
            # First the machine, which waits for this: whatever the listener does with the numbers.
            self.feed(ev.ChunkLanded(seq, rank))
            if self._importer is not None:
                self._site.transferred(report.num_bytes, report.seconds, self._importer.transport)

    async def _check(self, seq: int, rank: int) -> None:
        """Digests of what landed. The blocks count as loading until they are checked."""
        assert self._landing is not None  # landed only where reserved
        chunk, grant = self._heard.chunks[seq], self._grant_of(seq)
        try:
            landed = self._digests.pop((seq, rank))
            damage = await asyncio.to_thread(self._landing.find_damage, chunk, grant, landed)
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
        said = f"what landed from {self.peer.worker} is damaged: {damage}"
        if not self.over.is_set():
            self.counters["digest_mismatches"] += 1
            _log.error("handoff %s of request %s: %s", self.handoff, self.request, said)
        self.feed(ev.ChunkMismatched(seq, rank, said))

    def _note_landed(self, grant: Grant) -> None:
        self._blocks_moved += len(grant.segments)
        self._site.pool.landed(self._ask.owner, [segment.destination for segment in grant.segments])
        self._observe(Lifecycle.CHUNK_LANDED, seq=grant.seq, blocks=len(grant.segments))

    # Endings

    def _commit(self) -> None:
        pool, ask, heard, landing = self._site.pool, self._ask, self._heard, self._landing
        # VERIFIED comes after all of them.
        assert heard.opened is not None
        assert heard.filled is not None
        assert landing is not None
        assert self._importer is not None
        pool.commit(ask.owner)
        reused = landing.reused
        for block, name in zip(landing.table[reused : len(ask.names)], ask.names[reused:], strict=True):
            pool.name(ask.owner, block, name)
        self.counters["handoffs_committed"] += 1
        self._observe(Lifecycle.COMMITTED, blocks=len(landing.table), reused=reused)
        self._finish(
            Committed(
                owner=ask.owner,
                num_computed=ask.positions,
                transport=self._importer.transport,
                blocks_moved=self._blocks_moved,
                bytes_moved=self._bytes_moved,
                blocks_reused=reused,
                prefill_queue_s=heard.filled.prefill_queue_s,
                prefill_s=heard.filled.prefill_s,
                prefill_cached_tokens=heard.filled.cached_tokens,
                filled_seen_at=heard.filled_at,
                committed_at=self.clock.now(),
                prefill_worker=heard.opened.worker,
                prefill_incarnation=heard.opened.incarnation,
                prefill_pid=heard.opened.pid,
                prefix=heard.filled.prefix,
            )
        )

    def _finish(self, result: Committed | NotServed) -> None:
        if isinstance(result, NotServed):
            self.counters[result.reason.value] += 1
        if not self.result.done():
            self.result.set_result(result)

    def _gave_up(self, state: str) -> None:
        self._site.reservations.leave(self)
        if self._connecting is not None:
            self._connecting.cancel()  # it writes no block: nothing has to wait for it

    def _defect(self, error: Exception) -> None:
        self._log_defect(error)
        self._finish(NotServed(Outcome.FAILED, f"a defect of this worker: {from_foreign(error)}"))
        if self.machine.state is DecodeState.COMMITTED:
            # The commit itself failed: a caller who hears of no blocks owns none.
            if not isinstance(self.result.result(), Committed):
                self._site.pool.release(self._ask.owner)
        elif self.machine.state in (DecodeState.ABORTED, DecodeState.DRAINED):
            # Blocks that a transport may write stay in quarantine: losing them is better than sharing them.
            self._site.pool.release(self._ask.owner)
            self._break()
        elif not self.machine.terminal:
            self.feed(ev.Cancelled("a defect of D"))
            for seq, rank in sorted(self.machine.writing - self._fetches.keys()):
                # Granted in the step that broke: nobody else will say that it is over.
                self.feed(ev.ChunkFailed(seq, rank, "the fetch never began"))
