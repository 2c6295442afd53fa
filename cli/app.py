"""The command tree. Commands import what they need when they run: `--help` loads no torch, ray or grpc."""

import sys
from typing import Annotated

import typer

from pdserve import __version__
from pdserve.cli.bench_command import bench
from pdserve.cli.certs_command import certs
from pdserve.cli.chat_command import chat
from pdserve.cli.config_command import config
from pdserve.cli.demo_command import demo
from pdserve.cli.generate_command import generate
from pdserve.cli.members_command import members
from pdserve.cli.models_command import models
from pdserve.cli.serve_command import serve
from pdserve.cli.status_command import status
from pdserve.core.errors import PdserveError

app = typer.Typer(
    name="pdserve",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"pdserve {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """A disaggregated prefill/decode serving cluster for large language models."""


app.command()(serve)
app.command()(chat)
app.command()(generate)
app.add_typer(members, name="members")
app.command()(status)
app.command()(models)
app.command()(config)
app.command()(certs)
app.command()(demo)
app.add_typer(bench, name="bench")


def run(arguments: list[str]) -> int:
    """Run one command; returns the exit status. Errors of ours are one line on stderr, without a trace."""
    try:
        app(arguments, prog_name="pdserve")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    except PdserveError as error:
        print("pdserve:", *error.message.split(), file=sys.stderr)  # one line, whatever it quotes
        return 1
    return 0
