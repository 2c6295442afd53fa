"""P's shell: carries out one handoff's instructions until nobody touches its blocks, with or without D."""

import asyncio
import math

from pdserve.core.lifecycle import Lifecycle
from pdserve.core.perfmodel import Prediction
from pdserve.core.types import OwnerId, blocks_for
from pdserve.kvtransfer.handoff import events as ev
from pdserve.kvtransfer.handoff import instructions as do
from pdserve.kvtransfer.handoff import wire
from pdserve.kvtransfer.handoff.exposure import Exposure
from pdserve.kvtransfer.handoff.fill import Fill
from pdserve.kvtransfer.handoff.messages import OpenedReply, OpenRequest, Rejection, offers_among
from pdserve.kvtransfer.handoff.prefill_side import PREFILL_TABLE, PrefillHandoff
from pdserve.kvtransfer.handoff.prefill_site import PrefillSite
from pdserve.kvtransfer.handoff.shell import Shell
from pdserve.kvtransfer.handoff.state_deadlines import AT_ONCE, StateBound, prefill_bound
from pdserve.kvtransfer.handoff.states import Outcome, PrefillState
from pdserve.kvtransfer.transports.base import Exporter, Failed, Grant, SourceDone
from pdserve.proto import handoff_pb2 as pb


class PrefillSession(Shell[PrefillHandoff, pb.PrefillMessage]):
    """One handoff at P, from Open to the last pin."""

    def __init__(self, site: PrefillSite, asked: OpenRequest) -> None:
        super().__init__(
            PREFILL_TABLE,
            PrefillHandoff(),
            handoff=asked.handoff,
            request=asked.request,
            config=site.config,
            clock=site.clock,
            observer=site.observer,
            counters=site.counters,
        )
        self._site = site
        self._asked = asked
        self._tokens = len(asked.token_ids)
        self._blocks = blocks_for(self._tokens)
        self.owner = OwnerId(f"export/{asked.handoff}")
        self._accepted_at = self.clock.now()
        self._deadline = self._accepted_at + _waits_s(asked.remaining_s, site.config.request_deadline_s)
        self._fill_estimate = AT_ONCE
        self._exposure = Exposure(site.pool, site.storage, self.owner, self._tokens, digest=asked.digest)
        self._fill = Fill(
            site, asked, self.owner, self._deadline, self._exposure, feed=self.feed, observe=self._observe
        )
        self._grants: dict[int, tuple[Grant, Exporter]] = {}
        self._refusal: Rejection | None = None

    def start(self, refusal: Rejection | None) -> None:
        """Answer Open: no, because of `refusal`, or yes and wait for a share of the pool.

        What is held is pinned here, with its share, or refused: nobody waits for it.
        """
        held_only = self._asked.held_only
        self._refusal = refusal or (self._hold() if held_only else None)
        if self._refusal is not None:
            self.counters["rejected"] += 1
            self.feed(ev.Refused(self._refusal.reason))
            return
        self._start_timers()
        self.counters["accepted"] += 1
        self.feed(ev.Accepted())
        self._observe(Lifecycle.PREFILL_QUEUED)
        if held_only:
            self.feed(ev.Admitted())
        else:
            self._site.queue.enter(self.handoff, self._blocks, lambda: self.feed(ev.Admitted()))

    def _hold(self) -> Rejection | None:
        """Pin all that is asked for and take its share of the pool; else why not, and nothing is taken."""
        site, names = self._site, self._asked.chain
        held = len(site.pool.acquire_prefix(self.owner, names))
        if held < len(names):
            site.pool.release(self.owner)
            worker = site.record().worker
            said = f"{worker} holds only {held} of {len(names)} blocks"
            return Rejection(Outcome.REJECTED, said, held_blocks=held)
        if not site.queue.enter_now(self.handoff, self._blocks):
            site.pool.release(self.owner)
            lent, limit = site.queue.lent, site.queue.capacity
            said = f"{lent} of {limit} blocks are lent to others, {held} are asked for"
            return Rejection(Outcome.REJECTED, said)
        return None

    def is_late(self, bound_s: float) -> bool:
        """Everything was computed `bound_s` seconds ago, and the reader has not asked for any of it."""
        machine, filled_at = self.machine, self._fill.ended_at
        unread = machine.state is PrefillState.FILLED and machine.closing is None and not self._grants
        return unread and filled_at is not None and self.clock.now() - filled_at >= bound_s

    @property
    def blocks(self) -> int:
        """Blocks of P's pool that it takes."""
        return self._blocks

    # The stream

    def receive(self, message: pb.DecodeMessage) -> None:
        """One message of D as one event."""
        self.watch.heard(self.clock.now())
        match message.WhichOneof("message"):
            case "grant":
                self.feed(self._hear_grant(message.grant))
            case "release":
                self.feed(ev.ReleaseAsked())
            case "abort":
                self.feed(ev.PeerAborted(message.abort.reason))
            case "heartbeat":
                self.watch.progressed(message.heartbeat.progress, self.clock.now())
            case other:
                self.feed(ev.Violation(f"D sent {other or 'a message without content'} in a running handoff"))

    def _hear_grant(self, message: pb.HandoffGrant) -> object:
        grant = wire.unpack_grant(message, self.handoff)
        exporter = self._site.exporters.get(message.transport)
        if exporter is None or message.transport not in self._asked.transports:
            return ev.Violation(f"transport {message.transport!r} was not offered")
        if grant.seq < len(self._exposure):
            if not self._exposure.allows(grant):
                return ev.Violation(f"grant {grant.seq} names blocks that chunk {grant.seq} does not expose")
            self._grants[grant.seq] = (grant, exporter)
        return ev.GrantAsked(grant.seq)

    def _heartbeat(self) -> pb.PrefillMessage:
        # Only a fill is the engine's work; otherwise it is enough that this loop runs.
        working = self.machine.state is PrefillState.FILLING and not self._fill.fetches_prefix
        return wire.pack_prefill_heartbeat(self._site.progress() if working else self.beats)

    def _bound(self) -> StateBound:
        return prefill_bound(self.machine, self._entered_at, self._deadline, self._fill_estimate)

    def _peer_works(self) -> bool:
        return False

    def _on_beat(self) -> None:
        """A reader that is late loses its blocks to handoffs that wait for their share."""
        if len(self._site.queue) and self.is_late(self.config.silence_s):
            self.downgrade()

    def downgrade(self) -> None:
        """Keep what was computed as plain cache; the reader is told."""
        self.counters["downgraded"] += 1
        self.feed(ev.MemoryPressure())

    # Instructions

    def _carry_out(self, instruction: do.Instruction) -> None:
        match instruction:
            case do.SendOpened():
                self._send(wire.pack_opened(self._opened_reply()))
            case do.SendRejected():
                assert self._refusal is not None  # it is what the machine was refused with
                self._send(wire.pack_rejected(self._refusal))
            case do.StartFill():
                self._spawn(self._fill.run())
            case do.CancelFill():
                self._fill.stop()
            case do.SendChunk(seq):
                chunk = self._exposure[seq]
                self._observe(Lifecycle.CHUNK_READY, seq=seq, blocks=chunk.blocks)
                self._send(wire.pack_chunk(chunk))
            case do.SendFilled(chunks):
                self._send(wire.pack_filled(self._fill.account(chunks, self._accepted_at)))
            case do.Serve(seq, rank):
                grant, exporter = self._grants[seq]
                self._spawn(exporter.serve(grant), lambda done: self._served(done, seq, rank))
            case do.SendSourceFailed(seq, reason):
                epoch = self._grants[seq][0].epoch if seq in self._grants else 0
                self._send(wire.pack_source_failed(epoch, seq, reason))
            case do.SendReleased(status):
                self.counters[f"released_{status.value}"] += 1
                self._send(wire.pack_released(status))
            case do.SendAbort(reason):
                self._send(wire.pack_prefill_abort(reason))
            case do.Unpin():
                self._unpin()
                self.feed(ev.Unpinned())
            case _:
                raise ValueError(f"no instruction of P's: {instruction}")

    def _opened_reply(self) -> OpenedReply:
        site, record = self._site, self._site.record()
        cached = site.pool.match(self._asked.chain)
        estimate = self._fill.estimate(cached)
        self._fill_estimate = Prediction(estimate.seconds, estimate.relative_error)
        offers = [exporter.offer() for exporter in site.exporters.values()]
        return OpenedReply(
            estimate_s=estimate.seconds,
            queue_position=estimate.queue_position + len(site.queue),
            offers=offers_among(offers, self._asked.transports),
            worker=record.worker,
            incarnation=record.incarnation,
            pid=record.pid,
            cached_blocks=cached,
        )

    # Endings

    def _served(self, task: "asyncio.Task[SourceDone | Failed]", seq: int, rank: int) -> None:
        """The transport reported: it has read the chunk for the last time."""
        if task.cancelled():
            self.feed(ev.ServeFailed(seq, rank, "the serve was called off"))
        elif (error := task.exception()) is not None:
            self.feed(ev.ServeFailed(seq, rank, f"the transport raised {error!r}"))
        elif isinstance(report := task.result(), Failed):
            self.feed(ev.ServeFailed(seq, rank, report.reason))
        else:
            self.feed(ev.ServeDone(seq, rank))

    def _gave_up(self, state: str) -> None:
        # Serves that wait for their reader end now, so that the drain does.
        self._forget()

    def _unpin(self) -> None:
        self._forget()
        self._site.pool.release(self.owner)
        self._site.queue.leave(self.handoff)

    def _forget(self) -> None:
        for exporter in self._site.exporters.values():
            exporter.forget(self.handoff)

    def _defect(self, error: Exception) -> None:
        self._log_defect(error)
        if self.machine.state in (PrefillState.ABORTED, PrefillState.DRAINED):
            # Whoever may still touch the blocks keeps them: losing them is better than sharing them.
            self._break()
        elif not self.machine.terminal:
            self.feed(ev.Cancelled("a defect of P"))


def _waits_s(remaining_s: float | None, limit_s: float) -> float:
    """How long D waits, as far as it said so in a number."""
    if remaining_s is None or not math.isfinite(remaining_s):
        return limit_s
    return max(0.0, remaining_s)
