"""A cluster's status as a page: tables for a terminal of 80 columns, a few lines per worker for less."""

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pdserve.cli.tables import make_table
from pdserve.client import ClusterStatus, WorkerStatus
from pdserve.client.values import TransportUse

TABLE_COLUMNS = 80
STATES = ("free", "held", "reserved", "cached", "loading", "quarantined")
"""Of blocks; they sum to the total, `promised` overlays them."""


def status_page(seen: ClusterStatus, width: int) -> Group:
    """Who is there, what they do, what their KV pools hold, what moved, and how the index does.

    `width`: columns of the terminal.
    """
    workers = seen.workers
    parts: list[RenderableType]
    if not workers:
        parts = [Text("no worker has joined")]
    elif width < TABLE_COLUMNS:
        parts = [Text(_card(worker)) for worker in workers]
    else:
        parts = [_members(workers), _load(workers), _blocks(workers), _transports(workers)]
    spaced = [line for part in parts for line in (part, Text())]
    return Group(*spaced, Text(_router(seen)))


def _card(w: WorkerStatus) -> str:
    blocks = ", ".join(f"{getattr(w.blocks, name)} {name}" for name in STATES if getattr(w.blocks, name))
    lines = [
        f"{w.worker}  {_role(w)}  {w.state}",
        f"  {w.incarnation} at {w.endpoint}",
        f"  process {w.pid}, up {_span(w.uptime_s)}",
        f"  {w.running} running, {w.waiting} waiting, {w.in_flight} in flight",
        f"  {w.handoffs} handoffs, {w.preemptions} preempted",
        f"  {w.blocks.total} blocks: {blocks}; {w.blocks.promised} promised",
    ]
    lines += [
        line
        for use in w.transports
        for line in (
            f"  {size(use.bytes)} fetched over {use.transport} in {use.chunks} chunks, {_rate(use)}/s",
            f"  {use.pairs} pairs use {use.transport}, {use.falls} falls to it",
        )
    ]
    return "\n".join(lines)


def _members(workers: tuple[WorkerStatus, ...]) -> Table:
    rows = (
        (w.worker, _role(w), w.state, w.incarnation, w.endpoint, str(w.pid), _span(w.uptime_s))
        for w in workers
    )
    return make_table(("worker", "role", "state", "incarnation", "endpoint"), ("pid", "up"), rows)


def _load(workers: tuple[WorkerStatus, ...]) -> Table:
    rows = (
        (w.worker, *map(str, (w.running, w.waiting, w.in_flight, w.handoffs, w.preemptions))) for w in workers
    )
    numbers = ("running", "waiting", "in flight", "handoffs", "preempted")
    return make_table(("sequences",), numbers, rows)


def _blocks(workers: tuple[WorkerStatus, ...]) -> Table:
    rows = (
        (w.worker, *(str(getattr(w.blocks, name)) for name in (*STATES, "total", "promised")))
        for w in workers
    )
    return make_table(("blocks",), (*STATES, "total", "promised"), rows)


def _transports(workers: tuple[WorkerStatus, ...]) -> Table | Text:
    rows = [
        (
            w.worker,
            use.transport,
            str(use.pairs),
            str(use.chunks),
            size(use.bytes),
            _rate(use),
            str(use.falls),
        )
        for w in workers
        for use in w.transports
    ]
    if not rows:
        return Text("no KV cache has moved")
    return make_table(("fetched by", "over"), ("pairs", "chunks", "moved", "per second", "falls"), rows)


def _router(seen: ClusterStatus) -> str:
    use = seen.index_use
    answers = "answers" if seen.index_available else "is away, the ring alone places"
    lines = [f"index: {seen.index} {answers}"]
    if use is not None:
        answered = use.lookups - use.unanswered
        mean = f", {1e3 * use.seconds / answered:.1f} ms on average" if answered else ""
        found = f" ({100 * use.found_blocks / use.asked_blocks:.0f} %)" if use.asked_blocks else ""
        lines.append(f"lookups: {use.lookups}{mean}; {use.unanswered} unanswered")
        lines.append(f"prompt blocks found: {use.found_blocks} of {use.asked_blocks}{found}")
    lines.append(f"membership: {seen.admin or 'nobody supervises the workers'}")
    lines.append(f"{seen.requests_in_flight} requests in flight")
    return "\n".join(lines)


def size(num_bytes: float) -> str:
    """Bytes in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def _rate(use: TransportUse) -> str:
    return size(use.bytes / use.seconds) if use.seconds > 0 else "-"


def _role(worker: WorkerStatus) -> str:
    """With the share of prefill, where it is not all or nothing."""
    shared = 0 < worker.role_weight < 1
    return f"{worker.role} {worker.role_weight:g}" if shared else worker.role


def _span(seconds: float) -> str:
    """The two largest units."""
    minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86400
    if days:
        return f"{days:.0f}d {hours % 24:.0f}h"
    if hours:
        return f"{hours:.0f}h {minutes % 60:.0f}m"
    return f"{minutes:.0f}m {seconds % 60:.0f}s"
