"""P's side of handoffs: prefills prompts for decode workers and lets them fetch the KV."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from grpc import aio

from pdserve.core.clock import Clock
from pdserve.core.config import HandoffConfig
from pdserve.core.errors import ConfigError, InternalError
from pdserve.core.types import BLOCK_TOKENS, HandoffId, blocks_for
from pdserve.core.worker_record import WorkerRecord
from pdserve.kvtransfer.handoff import wire
from pdserve.kvtransfer.handoff.events import Cancelled, StreamClosed
from pdserve.kvtransfer.handoff.export_queue import ExportQueue
from pdserve.kvtransfer.handoff.filler import Filler, FillEstimate, FillProgress
from pdserve.kvtransfer.handoff.messages import OffersRequest, OpenRequest, Rejection, offers_among
from pdserve.kvtransfer.handoff.prefill_session import PrefillSession
from pdserve.kvtransfer.handoff.prefill_site import PrefillSite
from pdserve.kvtransfer.handoff.prefix_fetch import PrefixFetch
from pdserve.kvtransfer.handoff.shell import Observer
from pdserve.kvtransfer.handoff.states import Outcome
from pdserve.kvtransfer.pool.pool import KvPool
from pdserve.kvtransfer.pool.storage import KvStorage
from pdserve.kvtransfer.transports.base import Exporter
from pdserve.proto import handoff_pb2 as pb
from pdserve.proto import handoff_pb2_grpc

__all__ = ["FillEstimate", "FillProgress", "Filler", "HandoffServicer"]


class HandoffServicer(handoff_pb2_grpc.HandoffServicer):
    """pdserve.v1.Handoff of one prefill worker. Runs on one event loop; owns its exporters.

    At most `config.export_share` of the pool is lent to handoffs that are not released; others wait in line.
    """

    def __init__(
        self,
        *,
        record: Callable[[], WorkerRecord],
        pool: KvPool,
        storage: KvStorage,
        filler: Filler,
        exporters: Sequence[Exporter],
        config: HandoffConfig,
        progress: Callable[[], int],
        clock: Clock,
        observer: Observer | None = None,
        prefixes: PrefixFetch | None = None,
    ) -> None:
        """`exporters` best rung first. `progress` counts the engine's work; readers suspect a P whose counter
        stands still while it fills, so it has to move also while the engine has nothing that it could run.
        Without `prefixes` all is computed that this worker does not hold itself.
        """
        share = int(pool.counts().total * config.export_share)
        self._site = PrefillSite(
            record=record,
            pool=pool,
            storage=storage,
            filler=filler,
            exporters={exporter.transport: exporter for exporter in exporters},
            config=config,
            progress=progress,
            clock=clock,
            observer=observer,
            queue=ExportQueue(max(1, share)),
            prefixes=prefixes,
        )
        self._sessions: dict[HandoffId, PrefillSession] = {}
        self._lives: set[asyncio.Task[None]] = set()
        self._closed = False

    @property
    def counters(self) -> dict[str, int]:
        """Totals since start: accepted, rejected, released_<status>, downgraded, aborted_in_<state>,
        expired_in_<state>, silent_peers, defects.
        """
        return dict(self._site.counters)

    @property
    def export_blocks(self) -> int:
        """Most blocks that a prompt may take: a larger one can never be handed off from here."""
        return self._site.queue.capacity

    async def start(self) -> None:
        """Let the transports listen."""
        for exporter in self._site.exporters.values():
            await exporter.start()

    async def close(self) -> None:
        """Give up all handoffs, wait until engine and transports let go, close the transports. Idempotent."""
        self._closed = True
        self.abort_all("this worker is stopping")
        while self._lives:
            await asyncio.wait(self._lives)
        for exporter in self._site.exporters.values():
            await exporter.close()

    def abort_all(self, reason: str) -> None:
        """Give every handoff up, and say so to the readers."""
        for session in tuple(self._sessions.values()):
            session.feed(Cancelled(reason))

    async def until_idle(self, grace_s: float) -> None:
        """Wait until no handoff is left, or `grace_s` seconds have passed."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                while self._lives:
                    await asyncio.wait(self._lives)

    def in_flight(self) -> int:
        """Handoffs that have not ended, those that only drain included."""
        return len(self._sessions)

    def relieve(self, blocks: int, *, unread_s: float | None = None) -> int:
        """Others need `blocks`: downgrade handoffs that were filled `unread_s` seconds ago (silence_s if not
        given) and are still unread to plain cache, oldest first. Returns how many blocks that were.
        """
        bound = self._site.config.silence_s if unread_s is None else unread_s
        relieved = 0
        for session in tuple(self._sessions.values()):
            if relieved >= blocks:
                break
            if session.is_late(bound):
                session.downgrade()
                relieved += session.blocks
        return relieved

    def check_integrity(self) -> None:
        """Raise InternalError where blocks are lent to handoffs that do not exist."""
        self._site.pool.check_integrity()
        self._site.queue.check_integrity()
        if not self._sessions and (self._site.queue.lent or len(self._site.queue)):
            raise InternalError(f"no handoff is in flight, but {self._site.queue.lent} blocks are lent")

    async def Handoff(  # type: ignore[override]
        self, request_iterator: AsyncIterator[pb.DecodeMessage], context: Any
    ) -> None:
        """One stream is one transaction, and its lease."""
        messages = aiter(request_iterator)
        try:
            async with asyncio.timeout(self._site.config.silence_s):
                first = await anext(messages, None)
        except TimeoutError:
            return
        if first is None or first.WhichOneof("message") != "open":
            return
        try:
            asked = wire.unpack_open(first.open)
        except (ValueError, ConfigError) as error:
            refusal = Rejection(Outcome.SCHEMA, f"Open is not understood: {error}")
            await context.write(wire.pack_rejected(refusal))
            return
        if asked.handoff in self._sessions:
            # Not even a refused session may share an id: its end would release the other one's blocks.
            reason = f"handoff {asked.handoff} runs already: give every attempt an id of its own"
            await context.write(wire.pack_rejected(Rejection(Outcome.REJECTED, reason)))
            return
        session = self._begin(asked, self._refusal(asked))
        reader = asyncio.create_task(_read(messages, session))
        try:
            while (message := await session.outbox.get()) is not None:
                await context.write(message)
        finally:
            # Also on a cancel of the call: the session then drains without its stream.
            reader.cancel()
            session.feed(StreamClosed("D left"))

    async def Offers(self, request: pb.OffersRequest, context: Any) -> pb.OffersReply:
        """A D that has no request yet makes its importer: nothing is kept for it here."""
        try:
            asked = wire.unpack_offers_request(request)
        except (ValueError, ConfigError) as error:
            refusal = Rejection(Outcome.SCHEMA, f"the question is not understood: {error}")
            return wire.pack_offers(refusal)
        unfit = self._unfit(asked)
        offers = [exporter.offer() for exporter in self._site.exporters.values()]
        return wire.pack_offers(unfit or offers_among(offers, asked.transports))

    def _begin(self, asked: OpenRequest, refusal: Rejection | None) -> PrefillSession:
        session = self._sessions[asked.handoff] = PrefillSession(self._site, asked)
        task = asyncio.create_task(self._live(session), name=f"export-{asked.handoff}")
        self._lives.add(task)
        task.add_done_callback(self._lives.discard)
        session.start(refusal)
        return session

    async def _live(self, session: PrefillSession) -> None:
        try:
            await session.finished()
        finally:
            self._site.queue.leave(session.handoff)
            del self._sessions[session.handoff]

    def _unfit(self, asked: OpenRequest | OffersRequest) -> Rejection | None:
        """Why these two can never pair; None if they can."""
        record, layout = self._site.record(), self._site.storage.layout
        if asked.prefill_incarnation != record.incarnation:
            was = asked.prefill_incarnation
            return Rejection(
                Outcome.SCHEMA, f"{record.worker} is incarnation {record.incarnation} now, not {was}"
            )
        if asked.schema.hex() != record.schema:
            return Rejection(
                Outcome.SCHEMA, f"D serves schema {asked.schema.hex()}, {record.worker} {record.schema}"
            )
        if asked.layout != layout:
            return Rejection(Outcome.SCHEMA, f"D keeps {asked.layout}, {record.worker} keeps {layout}")
        return None

    def _refusal(self, asked: OpenRequest) -> Rejection | None:
        """Why this worker cannot serve that reader; None if it can."""
        record = self._site.record()
        if (unfit := self._unfit(asked)) is not None:
            return unfit
        if len(asked.chain) != len(asked.token_ids) // BLOCK_TOKENS or not asked.token_ids:
            return Rejection(
                Outcome.SCHEMA,
                f"{len(asked.chain)} names do not fit a prompt of {len(asked.token_ids)} positions",
            )
        if asked.held_only and len(asked.token_ids) % BLOCK_TOKENS:
            positions = len(asked.token_ids)
            return Rejection(Outcome.SCHEMA, f"{positions} positions are no whole blocks to be held")
        if record.draining or self._closed:
            return Rejection(Outcome.REJECTED, f"{record.worker} is draining and takes nothing new")
        blocks, limit = blocks_for(len(asked.token_ids)), self.export_blocks
        if blocks > limit:
            return Rejection(
                Outcome.REJECTED,
                f"a prompt of {len(asked.token_ids)} positions needs {blocks} blocks, {record.worker} lends "
                f"at most {limit}: send a shorter prompt, or enlarge engine.pool_blocks or "
                f"handoff.export_share",
            )
        return None


async def _read(messages: AsyncIterator[pb.DecodeMessage], session: PrefillSession) -> None:
    """Give D's messages to the session until the stream ends."""
    reason = "D ended the stream"
    try:
        async for message in messages:
            session.receive(message)
    except (aio.AioRpcError, aio.UsageError, asyncio.InvalidStateError) as error:
        reason = f"the stream broke: {error}"
    session.feed(StreamClosed(reason))
