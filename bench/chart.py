"""The chart of a transfer report: GB/s over size, both logarithmic."""

import importlib.util
from collections import defaultdict
from pathlib import Path

from pdserve.bench.figures import Figure, TransferReport
from pdserve.core.errors import ConfigError, Unavailable

_SUFFIXES = (".png", ".svg")
_EXTRA = "pip install 'pdserve[bench]'"
_STYLES = {"ceiling": ":", "peers": "-.", "results": "-"}
_WITH_DIGEST = "--"
_INCHES = (9.0, 6.0)


def check_chart(file: Path) -> None:
    """Raise, before anything is measured, what would keep `draw_chart` from drawing."""
    if file.suffix.lower() not in _SUFFIXES:
        raise ConfigError(f"a chart is a {' or '.join(_SUFFIXES)} file, not {str(file)!r}")
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(f"a chart needs matplotlib, which is not installed: {_EXTRA}")
    if not file.absolute().parent.is_dir():
        raise ConfigError(f"{file} cannot be written: there is no folder {file.absolute().parent}")


def draw_chart(report: TransferReport, file: Path) -> None:
    """One line per way. Raises Unavailable where the file cannot be written."""
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=_INCHES, layout="constrained")
    axes = canvas.add_subplot()
    for group, style in _STYLES.items():
        for (name, digest), figures in _lines(getattr(report, group)).items():
            label = f"{name} with digest" if digest else name
            color = "black" if group == "ceiling" else f"C{_color(report, name)}"
            axes.plot(
                [figure.bytes for figure in figures],
                [figure.gb_per_s for figure in figures],
                linestyle=_WITH_DIGEST if digest else style,
                marker="o" if name != "streaming" else "x",
                color=color,
                label=label,
            )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(lambda num_bytes, _: _size(num_bytes))
    axes.set_xlabel("bytes in scattered 16-token blocks")
    axes.set_ylabel("GB/s")
    axes.set_title(
        f"KV transfer on {report.device}, medians of {report.rounds} rounds, {report.kernel} copies"
    )
    axes.grid(which="both", alpha=0.3)
    axes.legend()
    try:
        canvas.savefig(file)
    except OSError as error:
        raise Unavailable(f"{file} cannot be written: {error.strerror}") from error


def _lines(figures: list[Figure]) -> dict[tuple[str, bool], list[Figure]]:
    lines: defaultdict[tuple[str, bool], list[Figure]] = defaultdict(list)
    for figure in sorted(figures, key=lambda figure: figure.bytes):
        lines[figure.transport, figure.digest].append(figure)
    return lines


def _color(report: TransferReport, name: str) -> int:
    """A way's place: with and without digest it has one colour."""
    return list(dict.fromkeys(f.transport for f in (*report.results, *report.peers))).index(name)


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 2**20:g} MB" if num_bytes >= 2**20 else f"{num_bytes / 2**10:g} KB"
