"""D's importers: made when a pair meets, on the best rung that works, kept, and let go of."""

import asyncio
import logging
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple
from weakref import WeakValueDictionary

from pdserve.core.clock import Clock, MonotonicClock
from pdserve.core.errors import PdserveError, Unavailable
from pdserve.core.security.tls import SocketTls
from pdserve.core.types import Incarnation, WorkerId
from pdserve.kvtransfer.pool.storage import KvStorage
from pdserve.kvtransfer.transports.base import Importer, Offer
from pdserve.kvtransfer.transports.ladder import DEFAULT_TIMEOUT_S, make_importer, ordered, survey
from pdserve.kvtransfer.transports.rung_health import UNKNOWN, Pace, is_no_better, retry_s, why_leave
from pdserve.kvtransfer.transports.way import Way

_log = logging.getLogger(__name__)

_Peer = tuple[WorkerId, Incarnation]
_Pair = tuple[WorkerId, Incarnation, str]


class RungUse(NamedTuple):
    """How D's pairs stand with one transport."""

    pairs: int = 0
    """Peers that are fetched from over it now."""
    falls: int = 0
    """Times that a pair came down to it because a better rung did not work, since the start."""


@dataclass(slots=True)
class _Experience:
    """What was learnt about one peer's rungs. It outlives the importers, not the incarnation."""

    condemned: dict[str, str] = field(default_factory=dict)
    """Rung -> why the trial condemned it."""
    usable: tuple[str, ...] = ()
    """Rungs without an obstacle, best first."""
    told: set[tuple[str, str]] = field(default_factory=set)
    """(rung, reason) that the log has."""


class ImporterCache:
    """One importer per (worker, incarnation, transport), least recently used closed first.

    The cache owns them: whoever got one must not close it. An importer closed under a fetch reports Failed.
    A rung that should work and does not is a warning, once per pair and reason, and a count.
    """

    def __init__(
        self,
        storage: KvStorage,
        allowed: Sequence[str],
        *,
        capacity: int = 64,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        tls: SocketTls | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._storage = storage
        self._allowed = ordered(allowed)
        self.capacity = capacity
        self._timeout_s = timeout_s
        self._tls = tls
        self._clock = clock or MonotonicClock()
        self._achieved: dict[str, Pace] = {}
        self._ways: OrderedDict[_Pair, Way] = OrderedDict()
        self._experience: OrderedDict[_Peer, _Experience] = OrderedDict()
        self._meetings: WeakValueDictionary[_Peer, asyncio.Lock] = WeakValueDictionary()
        self._falls: Counter[str] = Counter()

    def rungs(self) -> Mapping[str, RungUse]:
        """By transport, those that were ever of use."""
        pairs = Counter(pair[2] for pair, way in self._ways.items() if way.slow_until is None)
        return {name: RungUse(pairs[name], self._falls[name]) for name in sorted({*pairs, *self._falls})}

    def ways(self) -> Mapping[WorkerId, str]:
        """The transport over which each peer is fetched from, of those that were met and are kept."""
        return {
            worker: transport
            for (worker, _, transport), way in self._ways.items()  # the most recently used last
            if not way.condemned
        }

    async def get(
        self, worker: WorkerId, incarnation: Incarnation, offers: Sequence[Offer]
    ) -> Importer | None:
        """The pair's importer, made and warmed up if need be; None where no offer is allowed and in reach.

        A new incarnation closes what was made for the worker's earlier ones. Raises Unavailable where a rung
        looked usable and was not, and no other is left.
        """
        lock = self._meetings.setdefault((worker, incarnation), asyncio.Lock())
        async with lock:  # who comes meanwhile gets the same importer
            found = self._kept((worker, incarnation), offers)
            return found or await self._meet((worker, incarnation), offers)

    async def drop(self, worker: WorkerId, incarnation: Incarnation) -> None:
        """Close everything that leads to this incarnation; with shm, its memory is let go of."""
        await self._close([pair for pair in self._ways if pair[:2] == (worker, incarnation)])

    async def close(self) -> None:
        """Nobody may be in `get`."""
        await self._close(list(self._ways))

    def _kept(self, peer: _Peer, offers: Sequence[Offer]) -> Way | None:
        offered = {offer.transport for offer in offers}
        for rung in self._allowed:
            way = self._ways.get((*peer, rung)) if rung in offered else None
            if way is not None and way.slow_until is not None and self._clock.now() >= way.slow_until:
                _log.info("kv transfer from %s (%s) tries %s again", *peer, rung)
                way.reinstate(self._clock.now())
            if way is not None and not way.condemned:
                self._ways.move_to_end((*peer, rung))
                return way
        return None

    async def _meet(self, peer: _Peer, offers: Sequence[Offer]) -> Way | None:
        """Try the rungs from the top."""
        experience = self._learn(peer)
        failed: dict[str, str] = {}
        rungs = list(survey(offers, self._allowed, self._storage))
        usable = [rung.transport for rung in rungs if rung.obstacle is None]
        experience.usable = tuple(usable)
        slow = [way for way in self._ways_to(peer) if way.slow_until is not None]
        for rung in rungs:
            if rung.obstacle is not None:
                if not rung.obstacle.expected:
                    failed[rung.transport] = rung.obstacle.reason
                continue
            condemned = experience.condemned.get(rung.transport)
            if condemned is not None and (slow or rung.transport != usable[-1]):
                failed[rung.transport] = condemned  # only the last one is better than none
                continue
            if (kept := self._ways.get((*peer, rung.transport))) is not None:
                if kept.slow_until is None:
                    return kept  # condemned, and the last one
                failed[rung.transport] = str(kept.condemned)
                continue
            assert rung.offer is not None  # there is no obstacle
            try:
                way = await self._open(peer, rung.offer)
            except (OSError, PdserveError) as error:
                failed[rung.transport] = f"{type(error).__name__}: {error}"
                continue
            await self._keep(peer, way)
            self._tell(peer, experience, way.transport, failed)
            return way
        if slow:
            # Better than not at all; and it is not left again for what does not work.
            slow[0].reinstate(self._clock.now())
            experience.usable = (slow[0].transport,)
            return slow[0]
        if usable:
            raise Unavailable("; ".join(f"{rung}: {reason}" for rung, reason in failed.items()))
        return None

    async def _open(self, peer: _Peer, offer: Offer) -> Way:
        made = make_importer(offer, self._storage, timeout_s=self._timeout_s, tls=self._tls)
        way = Way(
            made, f"{peer[0]} ({peer[1]})", self._clock, lambda way, *sample: self._judge(peer, way, *sample)
        )
        try:
            await way.warm_up()
        except BaseException:
            await way.close()
            raise
        return way

    def _ways_to(self, peer: _Peer) -> list[Way]:
        """Best rung first."""
        found = (self._ways.get((*peer, rung)) for rung in self._allowed)
        return [way for way in found if way is not None]

    def _judge(self, peer: _Peer, way: Way, num_bytes: int, seconds: float) -> None:
        """A transfer of real size was measured: is its rung the right one?"""
        rung, now = way.transport, self._clock.now()
        self._achieved[rung] = self._achieved.get(rung, UNKNOWN).plus(num_bytes, seconds)
        if way.condemned is not None or now < way.spared_until:
            return  # what was under way when it was left; or leaving has brought nothing
        for above in self._ways_to(peer):
            if above.slow_until is not None and is_no_better(way.pace, above.pace):
                _log.info(
                    "kv transfer from %s (%s) goes back to %s: %s is no faster", *peer, above.transport, rung
                )
                above.reinstate(now + retry_s(above.times_slow))
                return
        experience = self._experience.get(peer)
        usable = () if experience is None else experience.usable
        lower = next(iter(usable[usable.index(rung) + 1 :]), None) if rung in usable else None
        if experience is None or lower is None:
            return
        others = (
            w.pace for pair, w in self._ways.items() if pair[2] == rung and w is not way and w.pace.known
        )
        elsewhere = max(others, key=lambda pace: pace.rate, default=UNKNOWN)
        reason = why_leave(way.pace, self._achieved.get(lower, UNKNOWN), elsewhere)
        if reason is not None:
            way.leave(reason, now + retry_s(way.times_slow + 1))
            self._tell(peer, experience, lower, {rung: reason})

    async def _keep(self, peer: _Peer, way: Way) -> None:
        self._ways[*peer, way.transport] = way
        pairs = list(self._ways)
        old = [other for other in pairs if other[0] == peer[0] and other[1] != peer[1]]
        rest = [other for other in pairs if other not in old]
        await self._close(old + rest[: max(0, len(rest) - self.capacity)])

    def _learn(self, peer: _Peer) -> _Experience:
        """What is known of the peer, with the newest verdicts on its ways."""
        for old in [other for other in self._experience if other[0] == peer[0] and other[1] != peer[1]]:
            del self._experience[old]
        experience = self._experience.setdefault(peer, _Experience())
        self._experience.move_to_end(peer)
        while len(self._experience) > self.capacity:
            self._experience.popitem(last=False)
        self._note_verdicts([pair for pair in self._ways if pair[:2] == peer])
        return experience

    def _note_verdicts(self, pairs: Sequence[_Pair]) -> None:
        for worker, incarnation, transport in pairs:
            experience = self._experience.get((worker, incarnation))
            way = self._ways[worker, incarnation, transport]
            if experience is not None and way.condemned is not None and way.slow_until is None:
                experience.condemned[transport] = way.condemned

    def _tell(self, peer: _Peer, experience: _Experience, transport: str, failed: Mapping[str, str]) -> None:
        """`failed`: the rungs above the one in use that should have worked, and why they did not."""
        news = [fall for fall in failed.items() if fall not in experience.told]
        for rung, reason in news:
            _log.warning("kv transfer from %s (%s) falls to %s, below %s: %s", *peer, transport, rung, reason)
        experience.told.update(news)
        if news:
            self._falls[transport] += 1

    async def _close(self, pairs: Sequence[_Pair]) -> None:
        self._note_verdicts(pairs)
        closing = [self._ways.pop(pair) for pair in pairs]
        await asyncio.gather(*(way.close() for way in closing))
