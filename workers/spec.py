"""What a worker process is told at its start."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pdserve.core.config import (
    EngineConfig,
    HandoffConfig,
    IndexConfig,
    SecurityConfig,
    SessionConfig,
    from_mapping,
    require,
    to_mapping,
)
from pdserve.core.types import Role, WorkerId

ROLE_WEIGHTS = {Role.PREFILL: 1.0, Role.MIXED: 0.5, Role.DECODE: 0.0}
"""Share of the token budget that a role spends on prefill, where nothing else is said."""


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """One worker. `index.redis_url` None means: alone, with an index and a membership in memory."""

    worker: str
    role: str
    model: str
    """What core.catalog resolves: a folder, a .gguf file, a packaged model's name, a hub id."""
    dtype: str = "float32"
    host: str = "127.0.0.1"
    port: int = 0
    engine: EngineConfig = field(default_factory=EngineConfig)
    handoff: HandoffConfig = field(default_factory=HandoffConfig)
    session: SessionConfig = field(default_factory=SessionConfig)
    index: IndexConfig = field(default_factory=IndexConfig)
    security: SecurityConfig = field(default_factory=SecurityConfig)

    def __post_init__(self) -> None:
        roles = tuple(str(role) for role in Role)
        require(self.role in roles, "role", self.role, f"one of {roles}")
        require(bool(self.worker), "worker", self.worker, "a name that no other worker has")

    @property
    def worker_id(self) -> WorkerId:
        return WorkerId(self.worker)

    @property
    def role_weight(self) -> float:
        return ROLE_WEIGHTS[Role(self.role)]

    def to_dict(self) -> dict[str, Any]:
        return to_mapping(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "WorkerSpec":
        """Raises ConfigError for unknown keys and wrong types."""
        return from_mapping(cls, fields)
