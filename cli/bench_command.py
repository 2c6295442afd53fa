"""`pdserve bench`: what this machine can do."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pdserve.core.errors import ConfigError, Unavailable

if TYPE_CHECKING:
    from pdserve.bench.transfer import Figure, TransferReport

bench = typer.Typer(no_args_is_help=True, help="Measure what this machine can do.")

_UNITS = {"": 1, "KB": 1 << 10, "MB": 1 << 20, "GB": 1 << 30}
_SIZE = re.compile(r"(\d+)\s*([KMG]B)?", re.IGNORECASE)


@bench.callback()
def _bench() -> None:
    """Measure what this machine can do."""


@bench.command()
def transfer(
    size: Annotated[
        list[str] | None,
        typer.Option(help="Bytes to move, as 65536, 64KB or 16MB; may be repeated. Default: 64KB to 64MB."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Measured rounds of each; figures are medians.")] = 15,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write everything measured to this file.")
    ] = None,
) -> None:
    """Move KV blocks between two processes over each transport, beside memcpy and gloo in the same run."""
    import asyncio

    from pdserve.bench.transfer import SIZES, measure_transfers

    sizes = SIZES if size is None else tuple(parse_size(text) for text in size)
    report = asyncio.run(measure_transfers(sizes, rounds))
    _show(report)
    if json_file is not None:
        try:
            json_file.write_text(json.dumps(report.to_dict(), indent=1) + "\n")
        except OSError as error:
            raise Unavailable(f"{json_file} cannot be written: {error.strerror}") from error


def parse_size(text: str) -> int:
    """Bytes of "64KB" and the like, in powers of 1024. Raises ConfigError."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or not int(match[1]):
        raise ConfigError(f"a size is a number above 0, with KB, MB or GB if need be, not {text!r}")
    return int(match[1]) * _UNITS[(match[2] or "").upper()]


def _show(report: "TransferReport") -> None:
    from pdserve.cli.tables import print_table

    figures = sorted((*report.ceiling, *report.peers, *report.results), key=lambda figure: figure.bytes)
    numbers = ("size", "p50 ms", "GB/s", "of memcpy")
    print_table(("transport", "digest"), numbers, (_row(figure) for figure in figures))
    typer.echo(f"medians of {report.rounds} rounds, scattered 16-token blocks, {report.kernel} copies")
    for name, reason in report.skipped:
        typer.echo(f"skipped {name}: {reason}")


def _row(figure: "Figure") -> tuple[str, ...]:
    size = f"{figure.bytes / 1024:g} KB" if figure.bytes < 1 << 20 else f"{figure.bytes / (1 << 20):g} MB"
    return (
        figure.transport,
        "yes" if figure.digest else "",
        size,
        f"{figure.p50_ms:.3f}",
        f"{figure.gb_per_s:.2f}",
        f"{figure.ratio_to_ceiling:.2f}",
    )
