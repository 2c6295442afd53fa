"""`pdserve bench transfer`: what each transport moves."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pdserve.core.errors import ConfigError

if TYPE_CHECKING:
    from pdserve.bench.figures import Figure, TransferReport

_UNITS = {"": 1, "KB": 1 << 10, "MB": 1 << 20, "GB": 1 << 30}
_DEVICE = re.compile(r"cpu|cuda(:\d+)?")
_SIZE = re.compile(r"(\d+)\s*([KMG]B)?", re.IGNORECASE)


def transfer(
    size: Annotated[
        list[str] | None,
        typer.Option(help="Bytes to move, as 65536, 64KB or 16MB; may be repeated. Default: 64KB to 256MB."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Measured rounds of each; figures are medians.")] = 15,
    device: Annotated[str, typer.Option(help="Where both pools are: cpu, cuda or cuda:N.")] = "cpu",
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write everything measured to this file.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw GB/s over size into this .png or .svg file.")
    ] = None,
) -> None:
    """Move KV blocks between two processes over each transport, beside memcpy, gloo and NIXL in one run."""
    import uvloop

    from pdserve.bench.chart import check_chart, draw_chart
    from pdserve.bench.transfer import SIZES, measure_transfers
    from pdserve.cli.json_file import write_json

    if _DEVICE.fullmatch(device) is None:
        raise ConfigError(f"a device is cpu, cuda or cuda:N, not {device!r}")
    sizes = SIZES if size is None else tuple(parse_size(text) for text in size)
    if plot is not None:
        check_chart(plot)
    report = uvloop.run(measure_transfers(sizes, rounds, device=device))
    _show(report)
    if json_file is not None:
        write_json(json_file, report.to_dict())
    if plot is not None:
        draw_chart(report, plot)


def parse_size(text: str) -> int:
    """Bytes of "64KB" and the like, in powers of 1024. Raises ConfigError."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or not int(match[1]):
        raise ConfigError(f"a size is a number above 0, with KB, MB or GB if need be, not {text!r}")
    return int(match[1]) * _UNITS[(match[2] or "").upper()]


def _show(report: "TransferReport") -> None:
    from pdserve.cli.tables import print_table

    figures = sorted((*report.ceiling, *report.peers, *report.results), key=lambda figure: figure.bytes)
    numbers = ("size", "p50 ms", "GB/s", "of ceiling")
    print_table(("transport", "digest"), numbers, (_row(figure) for figure in figures))
    typer.echo(f"medians of {report.rounds} rounds, scattered 16-token blocks, {report.kernel} copies")
    typer.echo("the ceiling is the fastest plain copy of one contiguous piece in one process")
    for whole in report.transactions:
        fetch = next(f for f in report.results if f[:3] == whole[:3])
        typer.echo(
            f"a whole handoff of {_size(whole.bytes)} over {whole.transport}, {_digest(whole.digest)}: "
            f"{whole.p50_ms:.3f} ms from Open to COMMITTED; the fetch alone: {fetch.p50_ms:.3f} ms"
        )
    for name, reason in report.skipped:
        typer.echo(f"skipped {name}: {reason}")


def _row(figure: "Figure") -> tuple[str, ...]:
    return (
        figure.transport,
        "yes" if figure.digest else "",
        _size(figure.bytes),
        f"{figure.p50_ms:.3f}",
        f"{figure.gb_per_s:.2f}",
        f"{figure.ratio_to_ceiling:.2f}",
    )


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1024:g} KB" if num_bytes < 1 << 20 else f"{num_bytes / (1 << 20):g} MB"


def _digest(wanted: bool) -> str:
    return "with digest" if wanted else "without digest"
