"""The fault matrix as it went: one row a case, written for docs/results/."""

import datetime
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from pdserve.kvtransfer.transports.base import TRANSPORT_LADDER


@dataclass(frozen=True, slots=True)
class Row:
    """One case that held. Seconds from the client's call to its end."""

    transport: str
    fault: str
    victim: str
    state: str
    what: str
    ended: str
    seconds: float
    bound_s: float
    integrity: str


def table(rows: Sequence[Row]) -> str:
    """One transport after the other, else in the order of the run; columns as wide as their longest cell."""
    rows = sorted(rows, key=lambda row: TRANSPORT_LADDER.index(row.transport))
    header = tuple(field.name for field in fields(Row))
    cells = [header, *(tuple(_cell(getattr(row, name)) for name in header) for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(header))]
    lines = [
        "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)) for line in cells
    ]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def write_table(rows: Sequence[Row], path: Path, command: str) -> None:
    """With what is needed to read it later."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    head = (
        f"# Fault matrix: {command}",
        f"# {now}, commit {commit.strip()}, {os.cpu_count()} cores, {len(rows)} cases",
        "# seconds: from the client's call to its end; bound_s: within which it had to end",
        "",
    )
    path.write_text("\n".join((*head, table(rows))))


def _cell(value: object) -> str:
    return f"{value:.1f}" if isinstance(value, float) else str(value) or "-"
