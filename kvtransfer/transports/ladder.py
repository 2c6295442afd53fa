"""Which transport a pair uses: the best rung that both allow and that reaches; and the importers in use."""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Sequence

from pdserve.core.errors import ConfigError, Unavailable
from pdserve.core.security.tls import SocketTls
from pdserve.core.types import Incarnation, WorkerId
from pdserve.kvtransfer.pool.storage import KvStorage
from pdserve.kvtransfer.transports.base import TRANSPORT_LADDER, Exporter, Importer, Offer
from pdserve.kvtransfer.transports.shm import ShmExporter, ShmImporter, reachable
from pdserve.kvtransfer.transports.tcp import TcpExporter, TcpImporter

_log = logging.getLogger(__name__)

DEFAULT_TIMEOUT_S = 10.0


def ordered(allowed: Sequence[str]) -> tuple[str, ...]:
    """`allowed` best rung first; ConfigError for a name that is no rung."""
    if unknown := set(allowed) - set(TRANSPORT_LADDER):
        raise ConfigError(f"unknown transports {sorted(unknown)}; choose from {list(TRANSPORT_LADDER)}")
    return tuple(rung for rung in TRANSPORT_LADDER if rung in allowed)


def choose(offers: Sequence[Offer], allowed: Sequence[str], storage: KvStorage) -> Offer | None:
    """The best offer that is allowed, has `storage`'s layout and can be reached from here; None if none is.

    What tcp reaches shows only at the first fetch, so its offer counts as reachable.
    """
    layout = storage.layout.fingerprint().hex()
    by_rung = {offer.transport: offer for offer in offers if offer.parameters.get("layout") == layout}
    for rung in ordered(allowed):
        offer = by_rung.get(rung)
        if offer is not None and (rung != "shm" or reachable(offer)):
            return offer
    return None


def make_importer(
    offer: Offer,
    storage: KvStorage,
    *,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    tls: SocketTls | None = None,
) -> Importer:
    """D's half for an offer. Raises Unavailable where it cannot be made (any more)."""
    if offer.transport == "shm":
        return ShmImporter(storage, offer, timeout_s=timeout_s)
    if offer.transport == "tcp":
        return TcpImporter(storage, offer, timeout_s=timeout_s, tls=None if tls is None else tls.client)
    raise Unavailable(f"no transport {offer.transport!r} here; choose from {list(TRANSPORT_LADDER)}")


def make_exporters(
    storage: KvStorage,
    allowed: Sequence[str],
    *,
    host: str = "127.0.0.1",
    advertise: str | None = None,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    tls: SocketTls | None = None,
) -> tuple[Exporter, ...]:
    """P's halves of all allowed rungs that `storage` can serve, best first, not started yet.

    `host` is where tcp listens, `advertise` the address that readers use, where it is another; with `tls` it
    is encrypted and both ends show certificates.
    """
    server = None if tls is None else tls.server
    exporters: list[Exporter] = []
    for rung in ordered(allowed):
        if rung == "shm" and storage.fd is not None:
            exporters.append(ShmExporter(storage))
        elif rung == "tcp":
            exporters.append(TcpExporter(storage, host, advertise=advertise, timeout_s=timeout_s, tls=server))
    return tuple(exporters)


_Pair = tuple[WorkerId, Incarnation, str]


class ImporterCache:
    """D's importers, one per (worker, incarnation, transport), least recently used closed first.

    The cache owns them: whoever got one must not close it. An importer closed under a fetch reports Failed.
    """

    def __init__(
        self,
        storage: KvStorage,
        allowed: Sequence[str],
        *,
        capacity: int = 64,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        tls: SocketTls | None = None,
    ) -> None:
        self._storage = storage
        self._allowed = ordered(allowed)
        self._capacity = capacity
        self._timeout_s = timeout_s
        self._tls = tls
        self._importers: OrderedDict[_Pair, Importer] = OrderedDict()

    async def get(
        self, worker: WorkerId, incarnation: Incarnation, offers: Sequence[Offer]
    ) -> Importer | None:
        """The pair's importer, made if need be; None where no offer is allowed and reachable.

        A new incarnation closes what was made for the worker's earlier ones.
        """
        offered = {offer.transport for offer in offers}
        for rung in self._allowed:
            if rung in offered and (found := self._importers.get((worker, incarnation, rung))) is not None:
                self._importers.move_to_end((worker, incarnation, rung))
                return found
        offer = choose(offers, self._allowed, self._storage)
        if offer is None:
            return None
        if offer.transport != self._allowed[0]:
            _log.warning(
                "kv transfer from %s (%s) uses %s, below the best allowed transport %s",
                worker,
                incarnation,
                offer.transport,
                self._allowed[0],
            )
        importer = make_importer(offer, self._storage, timeout_s=self._timeout_s, tls=self._tls)
        self._importers[worker, incarnation, offer.transport] = importer
        await self._close_surplus(worker, incarnation)
        return importer

    async def drop(self, worker: WorkerId, incarnation: Incarnation) -> None:
        """Close everything that leads to this incarnation; with shm, its memory is let go of."""
        await self._close([pair for pair in self._importers if pair[:2] == (worker, incarnation)])

    async def close(self) -> None:
        await self._close(list(self._importers))

    async def _close_surplus(self, worker: WorkerId, incarnation: Incarnation) -> None:
        pairs = list(self._importers)
        old = [pair for pair in pairs if pair[0] == worker and pair[1] != incarnation]
        rest = [pair for pair in pairs if pair not in old]
        await self._close(old + rest[: max(0, len(rest) - self._capacity)])

    async def _close(self, pairs: Sequence[_Pair]) -> None:
        closing = [self._importers.pop(pair) for pair in pairs]
        await asyncio.gather(*(importer.close() for importer in closing))
