"""`pdserve bench overlap`: what is left of the transfer when it overlaps with the prefill."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pdserve.bench.overlap import OverlapReport


def overlap(
    model: Annotated[
        str | None, typer.Option(help="What `pdserve serve --model` takes. Default: the demo model.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=32, help="Length of the prompts.")] = 4000,
    pairs: Annotated[int, typer.Option(min=1, help="Runs with and without overlap, in turns.")] = 10,
    transport: Annotated[
        list[str] | None, typer.Option(help="May be repeated. Default: shm and tcp.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write everything measured to this file.")
    ] = None,
) -> None:
    """Compare the exposed transfer of a long prompt with that of the same run without overlap."""
    import uvloop

    from pdserve.bench.overlap import TRANSPORTS, measure_overlap
    from pdserve.cli.json_file import write_json
    from pdserve.core.config import ServeConfig

    report = uvloop.run(
        measure_overlap(
            ServeConfig() if model is None else ServeConfig(model=model),
            prompt_tokens=tokens,
            pairs=pairs,
            transports=transport or TRANSPORTS,
            tell=lambda line: typer.echo(line, err=True),
        )
    )
    _show(report)
    if json_file is not None:
        write_json(json_file, report.to_dict())


def _show(report: "OverlapReport") -> None:
    from pdserve.cli.tables import print_table

    numbers = ("MB", "prefill s", "exposed ms", "without overlap ms", "ratio")
    rows = (
        (
            figure.transport,
            f"{figure.bytes / 1e6:.1f}",
            f"{figure.prefill_s:.2f}",
            f"{figure.overlapped_ms:.2f}",
            f"{figure.held_ms:.2f}",
            f"{figure.ratio:.3f}",
        )
        for figure in report.results
    )
    print_table(("transport",), numbers, rows)
    typer.echo(
        f"medians of {report.pairs} alternating pairs; {report.model} in {report.dtype}, prompts of "
        f"{report.prompt_tokens} tokens in chunks of {report.chunk_tokens}; "
        "without overlap: D's first fetch is held until P is FILLED"
    )
