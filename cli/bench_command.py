"""`pdserve bench`: what this machine can do."""

import typer

from pdserve.cli.bench_overlap_command import overlap
from pdserve.cli.bench_transfer_command import transfer

bench = typer.Typer(no_args_is_help=True, help="Measure what this machine can do.")


@bench.callback()
def _bench() -> None:
    """Measure what this machine can do."""


bench.command()(transfer)
bench.command()(overlap)
