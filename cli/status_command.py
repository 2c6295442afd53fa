"""`pdserve status`: the cluster as its router sees it."""

import json
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pdserve.cli.connection import DEFAULT_TARGET, Target
from pdserve.cli.credentials import CREDENTIALS, credentials
from pdserve.cli.gathering import gathers
from pdserve.core.errors import PdserveError

if TYPE_CHECKING:
    from pdserve.client import Client


@gathers("security", CREDENTIALS)
def status(
    security: Mapping[str, Any],
    target: Target = DEFAULT_TARGET,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for the answer.")] = 10.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    watch: Annotated[
        float | None, typer.Option(min=0.0, help="Show it again every so many seconds, until Ctrl-C.")
    ] = None,
) -> None:
    """Show workers, their load and KV pools, what moved between them, and the index."""
    from pdserve.client import Client

    with Client(target, timeout=timeout, **credentials(security)) as client:
        show = _show_json if as_json else _show_page
        if watch is None:
            show(client)
            return
        try:
            (_watch_json if as_json else _watch_page)(client, lambda: time.sleep(watch))
        except KeyboardInterrupt:
            return


def _show_json(client: "Client") -> None:
    typer.echo(json.dumps(client.status().to_dict()))


def _show_page(client: "Client") -> None:
    from pdserve.cli.status_page import status_page
    from pdserve.cli.tables import make_console

    console = make_console()
    console.print(status_page(client.status(), console.width))


def _watch_json(client: "Client", wait: Callable[[], None]) -> None:
    """One object a line; a cluster that does not answer is an object with its error."""
    while True:
        try:
            _show_json(client)
        except PdserveError as error:
            typer.echo(json.dumps({"error": error.message}))
        wait()


def _watch_page(client: "Client", wait: Callable[[], None]) -> None:
    """The page in place; pages one after the other where the output is no terminal."""
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    from pdserve.cli.status_page import status_page
    from pdserve.cli.tables import make_console

    page = Group()
    console = make_console()
    with Live(page, console=console, auto_refresh=False, screen=console.is_terminal) as live:
        while True:
            try:
                page = status_page(client.status(), console.width)
                shown = page
            except PdserveError as error:  # what was seen last, and why it is not renewed
                shown = Group(page, Text(f"\n{error.message}", "red"))
            if console.is_terminal:
                live.update(shown, refresh=True)
            else:
                console.print(shown)
            wait()
