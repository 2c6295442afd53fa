"""What a worker has done since it started, for status pages."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class TransportUse:
    """KV chunks that this worker has fetched over one transport."""

    chunks: int = 0
    num_bytes: int = 0
    seconds: float = 0.0
    """Time in copies, summed; copies may overlap."""

    def plus(self, num_bytes: int, seconds: float) -> "TransportUse":
        """With one more chunk."""
        return TransportUse(self.chunks + 1, self.num_bytes + num_bytes, self.seconds + seconds)


@dataclass(frozen=True, slots=True)
class WorkerUse:
    """Totals of one worker; `uptime_s` in seconds."""

    uptime_s: float = 0.0
    preemptions: int = 0
    transports: Mapping[str, TransportUse] = field(default_factory=dict)
