"""Configuration: frozen dataclasses, built once from nested mappings. Unknown keys are errors.

Where the values come from, and which of them wins: core/config_sources.py.
"""

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pdserve.core.errors import ConfigError
from pdserve.core.types import Disaggregation

DTYPES = ("float32", "bfloat16")
TRANSPORTS = ("auto", "inproc", "cuda_ipc", "nccl", "shm", "tcp")


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """One worker's engine and its KV pool."""

    token_budget: int = 512
    """Most tokens per step, prefill and decode together."""
    chunk_tokens: int = 256
    """Most prompt tokens of one sequence per step; also the size of a handoff's chunk."""
    max_sequences: int = 64
    pool_blocks: int = 1024
    threads: int = 1
    """Threads of the engine's arithmetic; more than cores in total makes all workers slower."""
    device: str = "cpu"
    overbook: float = 1.0
    """Promised blocks may exceed the pool by this factor; above 1 preemption pays for the difference."""
    headroom_tokens: int = 256
    """Completion tokens that a promise covers at most; growth past it may preempt."""

    def __post_init__(self) -> None:
        for name in ("token_budget", "chunk_tokens", "max_sequences", "pool_blocks", "threads"):
            require(getattr(self, name) >= 1, f"engine.{name}", getattr(self, name), "at least 1")
        require(self.overbook >= 1.0, "engine.overbook", self.overbook, "at least 1.0")
        require(self.headroom_tokens >= 0, "engine.headroom_tokens", self.headroom_tokens, "at least 0")


@dataclass(frozen=True, slots=True)
class HandoffConfig:
    """The transaction between D and P. Times in seconds."""

    digest: bool = True
    transport: str = "auto"
    heartbeat_s: float = 0.5
    silence_s: float = 3.0
    """No message or progress from the peer for this long: it is lost."""
    request_deadline_s: float = 120.0
    """Bound on a whole handoff where the request has no deadline of its own."""
    export_share: float = 0.5
    """Share of P's pool that may wait to be fetched."""

    def __post_init__(self) -> None:
        require(self.transport in TRANSPORTS, "handoff.transport", self.transport, f"one of {TRANSPORTS}")
        require(0 < self.export_share <= 1, "handoff.export_share", self.export_share, "in (0, 1]")
        require(self.heartbeat_s > 0, "handoff.heartbeat_s", self.heartbeat_s, "above 0")
        require(self.silence_s > self.heartbeat_s, "handoff.silence_s", self.silence_s, "above heartbeat_s")


@dataclass(frozen=True, slots=True)
class SessionConfig:
    """Between a router and a worker. Times in seconds."""

    heartbeat_s: float = 0.25
    silence_s: float = 3.0
    reattach_s: float = 5.0
    """How long D keeps the requests of a broken session."""
    unacknowledged_tokens: int = 256
    """Tokens that D keeps for a request whose router is away, at most."""
    client_buffer_tokens: int = 1024
    """A client that leaves more than this unread is aborted."""

    def __post_init__(self) -> None:
        require(self.heartbeat_s > 0, "session.heartbeat_s", self.heartbeat_s, "above 0")
        require(self.silence_s > self.heartbeat_s, "session.silence_s", self.silence_s, "above heartbeat_s")
        require(self.reattach_s >= 0, "session.reattach_s", self.reattach_s, "at least 0")
        for name in ("unacknowledged_tokens", "client_buffer_tokens"):
            require(getattr(self, name) >= 1, f"session.{name}", getattr(self, name), "at least 1")


@dataclass(frozen=True, slots=True)
class IndexConfig:
    """redis: the index of blocks and the membership."""

    redis_url: str | None = field(default=None, repr=False)
    """None: a server on PATH, else the embedded one. May hold a password, which nothing shows."""
    cluster: str = "default"
    """Prefix of every key, so that clusters can share one server."""
    timeout_s: float = 0.05
    """A locate that takes longer counts as no answer."""
    heartbeat_s: float = 0.5
    ttl_s: float = 3.0

    def __post_init__(self) -> None:
        named = re.fullmatch(r"[A-Za-z0-9_.-]+", self.cluster) is not None
        require(named, "index.cluster", self.cluster, "letters, digits, '_', '.' and '-' only")
        require(self.timeout_s > 0, "index.timeout_s", self.timeout_s, "above 0")
        require(self.heartbeat_s > 0, "index.heartbeat_s", self.heartbeat_s, "above 0")
        require(self.ttl_s > self.heartbeat_s, "index.ttl_s", self.ttl_s, "above heartbeat_s")


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """The front door."""

    host: str = "127.0.0.1"
    grpc_port: int = 50051
    """0 picks a free one."""
    http_port: int | None = None
    """Of the OpenAI HTTP API; 0 picks a free one, None: not served."""
    max_body_bytes: int = 16 * 1024 * 1024
    """Of one HTTP request."""
    max_in_flight: int = 512
    max_queue: int = 1024
    max_prompt_bytes: int = 4 * 1024 * 1024
    universal_share: float = 0.5
    """A leading block seen in more than this share of recent prompts is universal: the ring keys past it."""
    disaggregation: str = "cost"
    """cost: a prompt is handed off where that delays everybody less; always, never: whatever it costs."""

    def __post_init__(self) -> None:
        require(0 <= self.grpc_port <= 65535, "router.grpc_port", self.grpc_port, "in 0 to 65535")
        http = 0 if self.http_port is None else self.http_port
        require(0 <= http <= 65535, "router.http_port", self.http_port, "in 0 to 65535")
        require(self.max_queue >= 0, "router.max_queue", self.max_queue, "at least 0")
        for name in ("max_in_flight", "max_prompt_bytes", "max_body_bytes"):
            require(getattr(self, name) >= 1, f"router.{name}", getattr(self, name), "at least 1")
        share = self.universal_share
        require(0 < share <= 1, "router.universal_share", share, "in (0, 1]")
        modes = tuple(map(str, Disaggregation))
        require(self.disaggregation in modes, "router.disaggregation", self.disaggregation, f"one of {modes}")


@dataclass(frozen=True, slots=True)
class SecurityConfig:
    """Who may connect. Paths of PEM files; without them everything is plain text, which loopback can bear.

    `pdserve certs DIR` makes development certificates for all of these; `tls_dir = "DIR"` names them at once.
    """

    tls_dir: str | None = None
    """Folder with ca.pem, server.pem, server.key, worker.pem, worker.key and client-ca.pem: what the keys
    below are where they are not given."""
    tls_certificate: str | None = None
    """Shown to clients, on gRPC and HTTP. Signed by `tls_ca`."""
    tls_key: str | None = None
    tls_ca: str | None = None
    """Signs every worker's and router's certificate, and nobody else's: who has one may talk to workers."""
    worker_certificate: str | None = None
    """Shown by workers, and by routers to workers; for the DNS name pdserve-worker. None: tls_certificate."""
    worker_key: str | None = None
    client_certificates: bool = False
    """Clients, too, must show a certificate (mTLS). Workers and routers always do."""
    client_ca: str | None = None
    """Signs the clients' certificates. None: tls_ca, and then clients may talk to workers, too."""
    tokens_file: str | None = None
    """Bearer tokens of clients, one a line, `name:token` or `name:sha256:hex`; None: none is asked for."""

    def __post_init__(self) -> None:
        given = (self.tls_certificate, self.tls_key, self.tls_ca)
        together = all(given) or not any(given) or self.tls_dir is not None
        require(together, "security.tls_*", given, "certificate, key and ca, or none of them")
        pair = (self.worker_certificate, self.worker_key)
        require(all(pair) or not any(pair), "security.worker_*", pair, "certificate and key, or neither")
        for name in ("client_certificates", "client_ca", "worker_certificate"):
            value = getattr(self, name)
            require(
                self.tls or not value, f"security.{name}", value, "left out where TLS is off: set tls_dir"
            )

    @property
    def tls(self) -> bool:
        """Every connection is encrypted and checked."""
        return self.tls_dir is not None or self.tls_certificate is not None


@dataclass(frozen=True, slots=True)
class ServeConfig:
    """A whole cluster."""

    model: str = "smollm2-135m"
    dtype: str = "float32"
    prefill: int = 1
    decode: int = 1
    mixed: int = 0
    ray_address: str | None = None
    """None: a local Ray of its own, which ends with the cluster."""
    ready_file: str | None = None
    drain_grace_s: float = 30.0
    engine: EngineConfig = field(default_factory=EngineConfig)
    handoff: HandoffConfig = field(default_factory=HandoffConfig)
    session: SessionConfig = field(default_factory=SessionConfig)
    index: IndexConfig = field(default_factory=IndexConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    security: SecurityConfig = field(default_factory=SecurityConfig)

    def __post_init__(self) -> None:
        require(self.dtype in DTYPES, "dtype", self.dtype, f"one of {DTYPES}")
        for name in ("prefill", "decode", "mixed"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        require(self.drain_grace_s >= 0, "drain_grace_s", self.drain_grace_s, "at least 0")
        able = self.mixed + min(self.prefill, self.decode)
        asked = f"{self.prefill} prefill, {self.decode} decode, {self.mixed} mixed"
        require(able > 0, "workers", asked, "at least one of each of prefill and decode, or one mixed")


class WrongKey(ConfigError):
    """A key that does not exist, or whose value is wrong. `key` is dotted: `engine.threads`."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key


def require(holds: bool, key: str, value: object, limit: str) -> None:
    """Raise the one form of message that wrong values have."""
    if not holds:
        raise WrongKey(key, f"{key} is {value!r}: it must be {limit}")


T = TypeVar("T")


def from_mapping(kind: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """Build a config dataclass from nested mappings.

    Raises WrongKey for unknown keys (naming the known ones) and for values of another type.
    """
    known = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(kind)
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{where}.{name}" if where else name
        if name not in known:
            place = f"[{where}]" if where else "the configuration"
            guess = _guess(name, list(known))
            raise WrongKey(key, f"unknown key {name!r} in {place}: {guess}known are {', '.join(known)}")
        arguments[name] = _convert(hints[name], value, key)
    return kind(**arguments)


def to_mapping(config: Any) -> dict[str, Any]:
    """The inverse of `from_mapping`: plain dicts, strings and numbers, so that it can cross processes."""
    return dataclasses.asdict(config)


def value_types(kind: type[Any] = ServeConfig, where: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, type) of every value, in order; tables themselves are left out."""
    for name, hint in typing.get_type_hints(kind).items():
        key = f"{where}.{name}" if where else name
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            yield from value_types(hint, key)
        else:
            yield key, hint


def _guess(name: str, known: list[str]) -> str:
    """What was probably meant: a key that another table has, or one that is spelled almost so."""
    homes = [key for key, _ in value_types() if key.rpartition(".")[2] == name]
    if homes:
        table = homes[0].rpartition(".")[0]
        return f"did you mean {name} {f'in [{table}]' if table else 'above all tables'}? "
    close = difflib.get_close_matches(name, known, 1)
    return f"did you mean {close[0]}? " if close else ""


def _convert(kind: Any, value: Any, key: str) -> Any:
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if not isinstance(value, Mapping):
            raise WrongKey(key, f"{key} is {value!r}: it must be a table")
        return from_mapping(kind, value, key)
    allowed = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if float in allowed and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        names = " or ".join(t.__name__ for t in allowed if t is not type(None))
        raise WrongKey(key, f"{key} is {value!r}: it must be of type {names}")
    return value
