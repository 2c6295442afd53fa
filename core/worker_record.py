"""What a worker tells the cluster about itself: who it is, and how busy it is."""

from dataclasses import asdict, dataclass, field
from typing import Any

from pdserve.core.types import Incarnation, Role, WorkerId


@dataclass(frozen=True, slots=True)
class WorkerRecord:
    """One start of a worker. Two records with one `worker` differ in `incarnation`."""

    worker: WorkerId
    incarnation: Incarnation
    role: Role
    model: str
    schema: str
    """Hex digest of the logical schema: workers pair when it is equal."""
    endpoint: str
    """host:port of the worker's gRPC server."""
    pid: int
    context_tokens: int
    vocab_size: int
    dtype: str
    pool_blocks: int
    role_weight: float
    """Share of its token budget spent on prefill: 1 prefill only, 0 decode only."""
    draining: bool = False
    block_bytes: int = 0
    """Of the KV of one block, as this worker keeps it."""

    @property
    def prefills(self) -> bool:
        """May be asked to prefill for others."""
        return not self.draining and self.role_weight > 0.0

    @property
    def decodes(self) -> bool:
        """May own requests."""
        return not self.draining and self.role_weight < 1.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "WorkerRecord":
        fields = dict(fields)
        fields["role"] = Role(fields["role"])
        return cls(**fields)


@dataclass(frozen=True, slots=True)
class WorkerLoad:
    """A worker's work at the time of a heartbeat. Blocks count 16 tokens each."""

    queued_prefill_tokens: int = 0
    queued_prefills: int = 0
    """Sequences, running or waiting, that these tokens belong to; all others decode."""
    prefills: int = 0
    """Prompts whose computing has begun, since the start."""
    prefill_busy_s: float = 0.0
    """Time of the steps that computed prompts, since the start."""
    running: int = 0
    waiting: int = 0
    context_tokens: int = 0
    free_blocks: int = 0
    cached_blocks: int = 0
    promised_blocks: int = 0
    total_blocks: int = 0
    progress: int = 0
    """Engine steps, and layers within them, since start."""
    perf_model: dict[str, float] = field(default_factory=dict)
    """Coefficients of the worker's PerfModel, see core/perfmodel.py."""
    ways: dict[str, str] = field(default_factory=dict)
    """Transport by worker, of those whose blocks this one fetches."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "WorkerLoad":
        return cls(**fields)
