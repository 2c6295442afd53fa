"""What all handoffs of one decode worker share."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from pdserve.core.clock import Clock
from pdserve.core.config import HandoffConfig
from pdserve.core.perfmodel import PerfModel
from pdserve.core.types import Incarnation, WorkerId
from pdserve.core.worker_record import WorkerRecord
from pdserve.kvtransfer.digest import DIGEST_BYTES
from pdserve.kvtransfer.handoff.reservations import Reservations
from pdserve.kvtransfer.handoff.shell import Observer
from pdserve.kvtransfer.pool.pool import KvPool
from pdserve.kvtransfer.pool.storage import KvStorage
from pdserve.kvtransfer.transports.base import Importer, Offer


class Importers(Protocol):
    """Who has the importer for a peer; see transports/importers.py."""

    async def get(
        self, worker: WorkerId, incarnation: Incarnation, offers: Sequence[Offer]
    ) -> Importer | None: ...

    async def drop(self, worker: WorkerId, incarnation: Incarnation) -> None:
        """Let go of a peer that is gone; nobody fetches from it now."""

    async def close(self) -> None: ...


@dataclass(slots=True)
class DecodeSite:
    """One worker's memory, ways and books, for its handoffs as a reader."""

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
    perf: PerfModel | None
    """Predicts transfers and judges P's estimates; without it blocks are taken at the first chunk."""
    counters: Counter[str] = field(default_factory=Counter)
    epochs: int = 0

    @property
    def digest_bytes(self) -> int | None:
        """Bytes of digests per block, None where none are wanted."""
        return self.storage.layout.segments_per_block * DIGEST_BYTES if self.config.digest else None
