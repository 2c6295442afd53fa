"""D's side of handoffs: fetches a prompt's KV from a prefill worker into this worker's pool."""

import asyncio
import contextlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterator

import grpc

from pdserve.core.channel_options import CHANNEL_OPTIONS
from pdserve.core.clock import Clock
from pdserve.core.config import HandoffConfig
from pdserve.core.errors import InternalError, InvalidRequest, Unavailable
from pdserve.core.perfmodel import PerfModel
from pdserve.core.security.tls import ClientTls
from pdserve.core.types import HandoffId, Incarnation, WorkerId
from pdserve.core.worker_record import WorkerRecord
from pdserve.kvtransfer.handoff import wire
from pdserve.kvtransfer.handoff.ask import Committed, HandoffAsk, HandoffPeer, NotServed
from pdserve.kvtransfer.handoff.decode_attempt import DecodeAttempt
from pdserve.kvtransfer.handoff.decode_site import DecodeSite, Importers
from pdserve.kvtransfer.handoff.events import Cancelled
from pdserve.kvtransfer.handoff.messages import OffersRequest, Rejection
from pdserve.kvtransfer.handoff.reservations import Reservations
from pdserve.kvtransfer.handoff.shell import Observer
from pdserve.kvtransfer.handoff.states import Outcome
from pdserve.kvtransfer.pool.pool import KvPool
from pdserve.kvtransfer.pool.storage import KvStorage
from pdserve.kvtransfer.transports.base import accepted
from pdserve.proto import handoff_pb2_grpc
from pdserve.proto.connections import connect

__all__ = ["Committed", "DecodeHandoffs", "HandoffAsk", "HandoffPeer", "NotServed"]

_IDLE_CHANNELS = 64
"""Channels kept for endpoints that no handoff uses now: as many as peers are met (workers/peers.py)."""


class DecodeHandoffs:
    """All handoffs of one decode worker. Runs on one event loop; owns its channels and its importers.

    The caller promises blocks before `fetch`, and owns the table of `ask.owner` once it is committed.
    """

    def __init__(
        self,
        *,
        record: Callable[[], WorkerRecord],
        pool: KvPool,
        storage: KvStorage,
        importers: Importers,
        config: HandoffConfig,
        progress: Callable[[], int],
        clock: Clock,
        observer: Observer | None = None,
        transferred: Callable[[int, float, str], object] | None = None,
        relieve: Callable[[int], object] | None = None,
        preempted: Callable[[], int] | None = None,
        perf: PerfModel | None = None,
        tls: ClientTls | None = None,
        channel: Callable[[grpc.aio.Channel], grpc.aio.Channel] = lambda channel: channel,
    ) -> None:
        """`progress` counts this worker's work. `transferred` is told (bytes, seconds, transport) of every
        chunk that landed. `relieve(blocks)` is called at every heartbeat while a reservation has to wait: it
        is HandoffServicer.relieve on a worker that also prefills. `preempted()` is how many blocks the
        engine's preempted sequences wait for; handoffs leave them. With `perf`, the model that learns from
        those transfers, blocks are taken as late as the transfer allows while the pool is tight; without it
        at the first chunk. `tls` is for the streams to prefill workers,
        `channel` says what is used in place of each of their channels.
        """
        self._tls = tls
        self._wrap = channel
        self._site = DecodeSite(
            record=record,
            pool=pool,
            storage=storage,
            importers=importers,
            transports=accepted(config.transport),
            config=config,
            progress=progress,
            clock=clock,
            observer=observer,
            transferred=transferred or (lambda num_bytes, seconds, transport: None),
            reservations=Reservations(pool, relieve, preempted),
            perf=perf,
        )
        self._numbers = itertools.count(1)
        self._attempts: dict[HandoffId, DecodeAttempt] = {}
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._users: Counter[str] = Counter()
        self._lost: set[tuple[WorkerId, Incarnation]] = set()
        self._drains: set[asyncio.Task[None]] = set()
        self._closed = False

    @property
    def counters(self) -> dict[str, int]:
        """Totals since start: handoffs_committed, one per Outcome, aborted_in_<state>, expired_in_<state>
        (given up for its time, on whichever deadline), digest_mismatches,
        reservations_deferred (handoffs that chose to wait), reservations_refused (tries), silent_peers,
        defects.
        """
        return dict(self._site.counters)

    @property
    def lowest_transport(self) -> str:
        """The last rung that this worker accepts: what it expects of a peer that it has never met."""
        return self._site.transports[-1]

    def in_flight(self) -> int:
        """Handoffs that have not ended, those that only drain included."""
        return len(self._attempts)

    async def fetch(self, ask: HandoffAsk, peer: HandoffPeer) -> Committed | NotServed:
        """Have `peer` prefill positions 0 to n-2 and fetch their KV; with `held_only` fetch what it has.

        Raises InvalidRequest for a prompt of fewer than two tokens. A cancel gives up: the table of
        `ask.owner` is empty then, and what a transport may still write stays in quarantine until it is over.
        """
        if ask.positions < 1:
            raise InvalidRequest(
                f"a prompt of {len(ask.token_ids)} tokens has nothing to hand off; compute it at once"
            )
        if self._closed:
            raise InternalError("these handoffs are closed; nothing can be fetched any more")
        attempt = self._start(ask, peer)
        try:
            return await asyncio.shield(attempt.result)
        except asyncio.CancelledError:
            attempt.feed(Cancelled("the request was cancelled"))
            # It may have committed in the moment of the cancel: nobody hears of it, nobody owns it.
            self._site.pool.release(ask.owner)
            raise

    def abort_all(self, reason: str) -> None:
        """Give every handoff up, and say so to the prefill workers."""
        for attempt in tuple(self._attempts.values()):
            attempt.feed(Cancelled(reason))

    async def until_idle(self, grace_s: float) -> None:
        """Wait until no handoff is left, or `grace_s` seconds have passed."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                while self._drains:
                    await asyncio.wait(self._drains)

    async def close(self) -> None:
        """Give up all handoffs, and wait until no transport can write. Idempotent."""
        self._closed = True
        self.abort_all("this worker is stopping")
        while self._drains:
            await asyncio.wait(self._drains)
        channels, self._channels = list(self._channels.values()), {}
        await asyncio.gather(*(channel.close() for channel in channels))
        await self._site.importers.close()

    def check_integrity(self) -> None:
        """Raise InternalError where the pool keeps blocks for handoffs that do not exist, or the reverse."""
        self._site.pool.check_integrity()
        if self._attempts:
            return
        self._site.reservations.check_idle()
        counts = self._site.pool.counts()
        if counts.reserved or counts.loading or counts.quarantined:
            raise InternalError(f"no handoff is in flight, but the pool says {counts}")

    def _start(self, ask: HandoffAsk, peer: HandoffPeer) -> DecodeAttempt:
        number = next(self._numbers)
        handoff = HandoffId(f"{self._site.record().incarnation}-{number}")
        attempt = self._attempts[handoff] = DecodeAttempt(self._site, handoff, ask, peer)
        task = asyncio.create_task(self._live(attempt), name=f"handoff-{handoff}")
        self._drains.add(task)
        task.add_done_callback(self._drains.discard)
        return attempt

    async def _live(self, attempt: DecodeAttempt) -> None:
        """From the first message to the end of the last copy."""
        try:
            with self._channel(attempt.peer.endpoint) as channel:
                attempt.start(channel)
                await attempt.finished()
        finally:
            del self._attempts[attempt.handoff]
        await self._let_go(attempt)

    async def meet(self, peer: HandoffPeer, timeout_s: float) -> str:
        """Connect to `peer` ahead of the first handoff from it; returns the transport.

        Raises Unavailable where that is not possible, or takes longer than `timeout_s` seconds.
        """
        site, record = self._site, self._site.record()
        asked = OffersRequest(
            schema=bytes.fromhex(record.schema),
            layout=site.storage.layout,
            transports=site.transports,
            decode_worker=record.worker,
            decode_incarnation=record.incarnation,
            prefill_incarnation=peer.incarnation,
        )
        try:
            async with asyncio.timeout(timeout_s):
                with self._channel(peer.endpoint) as channel:
                    stub = handoff_pb2_grpc.HandoffStub(channel)
                    offers = wire.unpack_offers(await stub.Offers(wire.pack_offers_request(asked)))
                if isinstance(offers, Rejection):
                    raise Unavailable(f"{peer.worker} and {record.worker} do not pair: {offers.reason}")
                importer = await site.importers.get(peer.worker, peer.incarnation, offers)
        except TimeoutError as error:
            raise Unavailable(f"{peer.worker} did not answer within {timeout_s:g} s") from error
        except (grpc.aio.AioRpcError, OSError, ValueError) as error:
            raise Unavailable(f"{peer.worker} cannot be met: {error}") from error
        if importer is None:
            raise Unavailable(f"no transport to {peer.worker}: none that it offers is in reach")
        return importer.transport

    async def part(self, worker: WorkerId, incarnation: Incarnation) -> None:
        """This start of a worker is gone for good: let go of what leads to it, behind the last handoff."""
        self._lost.add((worker, incarnation))
        await self._drop_lost((worker, incarnation))

    async def _let_go(self, ended: DecodeAttempt) -> None:
        """Close the way to a peer that was lost, behind the last handoff that may use it.

        A dead peer's memory is free when nobody maps it any more; one that is back is connected to anew.
        """
        pair = ended.peer.worker, ended.peer.incarnation
        result = ended.result.result() if ended.result.done() else None
        if isinstance(result, NotServed) and result.reason is Outcome.LOST:
            self._lost.add(pair)
        await self._drop_lost(pair)

    async def _drop_lost(self, pair: tuple[WorkerId, Incarnation]) -> None:
        in_use = any((at.peer.worker, at.peer.incarnation) == pair for at in self._attempts.values())
        if pair in self._lost and not in_use:
            self._lost.remove(pair)
            await self._site.importers.drop(*pair)

    @contextlib.contextmanager
    def _channel(self, endpoint: str) -> Iterator[grpc.aio.Channel]:
        channel = self._channels.pop(endpoint, None)
        if channel is None:
            channel = self._wrap(connect(endpoint, CHANNEL_OPTIONS, self._tls))
        self._channels[endpoint] = channel  # last: the most recently used
        self._users[endpoint] += 1
        try:
            yield channel
        finally:
            self._users[endpoint] -= 1
            self._close_surplus()

    def _close_surplus(self) -> None:
        idle = [endpoint for endpoint in self._channels if not self._users[endpoint]]
        for endpoint in idle[: max(0, len(idle) - _IDLE_CHANNELS)]:
            channel = self._channels.pop(endpoint)
            task = asyncio.create_task(channel.close())
            self._drains.add(task)
            task.add_done_callback(self._drains.discard)
