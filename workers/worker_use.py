"""What a worker has done since it started, for status pages."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace


@dataclass(frozen=True, slots=True)
class TransportUse:
    """KV chunks that this worker has fetched over one transport."""

    chunks: int = 0
    num_bytes: int = 0
    seconds: float = 0.0
    """Time in copies, summed; copies may overlap."""
    pairs: int = 0
    """Peers that it fetches from over this transport now."""
    falls: int = 0
    """Times that a pair came down to this transport because a better one did not work."""

    def plus(self, num_bytes: int, seconds: float) -> "TransportUse":
        """With one more chunk."""
        return replace(
            self,
            chunks=self.chunks + 1,
            num_bytes=self.num_bytes + num_bytes,
            seconds=self.seconds + seconds,
        )


@dataclass(frozen=True, slots=True)
class WorkerUse:
    """Totals of one worker; `uptime_s` in seconds."""

    uptime_s: float = 0.0
    preemptions: int = 0
    transports: Mapping[str, TransportUse] = field(default_factory=dict)
