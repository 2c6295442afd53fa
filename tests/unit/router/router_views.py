"""Workers and views for tests of placement."""

from collections.abc import Mapping

from pdserve.core.perfmodel import PerfModel
from pdserve.core.types import Incarnation, Role, WorkerId
from pdserve.core.worker_record import WorkerLoad, WorkerRecord
from pdserve.router.bookings import Charge
from pdserve.router.policies.base import PlacementRequest
from pdserve.router.view import ClusterView, WorkerView

WEIGHTS = {Role.PREFILL: 1.0, Role.DECODE: 0.0, Role.MIXED: 0.5}
SCHEMA = "00" * 16


def record(
    name: str, role: Role, *, pool_blocks: int = 1000, draining: bool = False, **changes: object
) -> WorkerRecord:
    fields: dict[str, object] = {
        "worker": WorkerId(name),
        "incarnation": Incarnation(f"{name}-start"),
        "role": role,
        "model": "tiny",
        "schema": SCHEMA,
        "endpoint": f"127.0.0.1:{1000 + sum(name.encode())}",
        "pid": 1,
        "context_tokens": 2048,
        "vocab_size": 512,
        "dtype": "float32",
        "pool_blocks": pool_blocks,
        "role_weight": WEIGHTS[role],
        "draining": draining,
    }
    return WorkerRecord(**{**fields, **changes})  # type: ignore[arg-type]


def worker(
    name: str,
    role: Role,
    *,
    queued: int = 0,
    promised: int = 0,
    context: int = 0,
    suspect: bool = False,
    draining: bool = False,
    pool_blocks: int = 1000,
    charged: Charge | None = None,
) -> WorkerView:
    charge = charged or Charge()
    load = WorkerLoad(
        queued_prefill_tokens=queued,
        queued_prefills=-(-queued // 500),
        promised_blocks=promised,
        context_tokens=context,
    )
    described = record(name, role, pool_blocks=pool_blocks, draining=draining)
    return WorkerView(described, load, PerfModel(), 256, charge, charge, suspect)


def prefillers(count: int, **changes: object) -> list[WorkerView]:
    return [worker(f"prefill-{number}", Role.PREFILL, **changes) for number in range(count)]  # type: ignore[arg-type]


def decoders(count: int, **changes: object) -> list[WorkerView]:
    return [worker(f"decode-{number}", Role.DECODE, **changes) for number in range(count)]  # type: ignore[arg-type]


def mixers(count: int, **changes: object) -> list[WorkerView]:
    return [worker(f"mixed-{number}", Role.MIXED, **changes) for number in range(count)]  # type: ignore[arg-type]


def view(*workers: WorkerView) -> ClusterView:
    return ClusterView(tuple(workers))


def request(
    tokens: int = 400,
    *,
    key: bytes = b"k" * 16,
    depths: Mapping[str, int] | None = None,
    refused: frozenset[str] = frozenset(),
    blocks: int | None = None,
) -> PlacementRequest:
    return PlacementRequest(
        prompt_tokens=tokens,
        promise_blocks=blocks if blocks is not None else tokens // 16 + 2,
        ring_key=key,
        depths={WorkerId(name): depth for name, depth in (depths or {}).items()},
        refused=frozenset(WorkerId(name) for name in refused),
    )
