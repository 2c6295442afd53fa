"""What all handoffs of one prefill worker share."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from pdserve.core.clock import Clock
from pdserve.core.config import HandoffConfig
from pdserve.core.worker_record import WorkerRecord
from pdserve.kvtransfer.handoff.export_queue import ExportQueue
from pdserve.kvtransfer.handoff.filler import Filler
from pdserve.kvtransfer.handoff.prefix_fetch import PrefixFetch
from pdserve.kvtransfer.handoff.shell import Observer
from pdserve.kvtransfer.pool.pool import KvPool
from pdserve.kvtransfer.pool.storage import KvStorage
from pdserve.kvtransfer.transports.base import Exporter


@dataclass(slots=True)
class PrefillSite:
    """One worker's memory, engine and exporters, for its handoffs as a source."""

    record: Callable[[], WorkerRecord]
    """Who this worker is now: its incarnation changes when it is fenced."""
    pool: KvPool
    storage: KvStorage
    filler: Filler
    exporters: dict[str, Exporter]
    """By transport, best rung first."""
    config: HandoffConfig
    progress: Callable[[], int]
    """A counter that moves while the engine gets on, also when it has nothing to do."""
    clock: Clock
    observer: Observer | None
    queue: ExportQueue
    prefixes: PrefixFetch | None
    """Brings what another worker holds before a fill; None: it is computed."""
    counters: Counter[str] = field(default_factory=Counter)
