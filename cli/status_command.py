"""`pdserve status`: the cluster as its router sees it."""

import json
from typing import TYPE_CHECKING, Annotated

import typer

from pdserve.cli.generate_command import DEFAULT_TARGET

if TYPE_CHECKING:
    from pdserve.client import ClusterStatus, WorkerStatus

NUMBERS = ("running", "waiting", "handoffs", "in flight", "free", "held", "cached", "promised", "blocks")


def status(
    target: Annotated[str, typer.Option(help="host:port of the cluster's gRPC API.")] = DEFAULT_TARGET,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for the answer.")] = 10.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show workers, their KV pools and their load."""
    from pdserve.client import Client

    with Client(target, timeout=timeout) as client:
        seen = client.status()
    if as_json:
        typer.echo(json.dumps(seen.to_dict()))
    else:
        _print_status(seen)


def _print_status(seen: "ClusterStatus") -> None:
    from pdserve.cli.tables import print_table

    print_table(("worker", "role", "state", "pid"), NUMBERS, map(_row, seen.workers))
    index = "answers" if seen.index_available else "is away, the ring alone places"
    typer.echo(f"index {seen.index} {index}; {seen.requests_in_flight} requests in flight")


def _row(worker: "WorkerStatus") -> tuple[str, ...]:
    blocks = worker.blocks
    numbers = (
        worker.running,
        worker.waiting,
        worker.handoffs,
        worker.in_flight,
        blocks.free,
        blocks.held,
        blocks.cached,
        blocks.promised,
        blocks.total,
    )
    return (worker.worker, worker.role, worker.state, str(worker.pid), *map(str, numbers))
