"""How the commands print tables."""

from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

PIPE_COLUMNS = 240
"""A pipe has no width; lines this long keep a row on one line, for grep."""


def make_table(texts: Sequence[str], numbers: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """Rows of `len(texts) + len(numbers)` cells; the first column, a name, is never broken."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for index, column in enumerate(texts):
        table.add_column(column, no_wrap=index == 0, overflow="fold")
    for column in numbers:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def make_console() -> Console:
    """Standard output: as wide as the terminal, or wide enough for every row."""
    console = Console()
    return console if console.is_terminal else Console(width=PIPE_COLUMNS)


def print_table(texts: Sequence[str], numbers: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Make a table and print it."""
    make_console().print(make_table(texts, numbers, rows))
