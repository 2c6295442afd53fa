"""What the transfer benchmark found."""

from dataclasses import dataclass, field
from typing import NamedTuple


class Figure(NamedTuple):
    """One way of moving `bytes`, without or with a digest: medians."""

    transport: str
    bytes: int
    digest: bool
    gb_per_s: float
    p50_ms: float
    ratio_to_ceiling: float


class Transaction(NamedTuple):
    """A whole handoff of `bytes` that P need not compute, from Open to COMMITTED: the median."""

    transport: str
    bytes: int
    digest: bool
    p50_ms: float


class Skipped(NamedTuple):
    """What was not measured, and why."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class TransferReport:
    """All figures of one run. `ceiling` and `peers` have no digest."""

    device: str
    """Where both pools are."""
    kernel: str
    """Who copies and digests for our transports: native code, or numpy."""
    rounds: int
    ceiling: list[Figure] = field(default_factory=list)
    """Plain copies; the fastest of a size is what the ratios of that size refer to."""
    results: list[Figure] = field(default_factory=list)
    peers: list[Figure] = field(default_factory=list)
    transactions: list[Transaction] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)

    def to_dict(self) -> dict[str, object]:
        """As plain values, for JSON."""
        groups = ("ceiling", "results", "peers", "transactions", "skipped")
        return {"device": self.device, "kernel": self.kernel, "rounds": self.rounds} | {
            group: [entry._asdict() for entry in getattr(self, group)] for group in groups
        }
