"""`pdserve certs`: a development certificate authority and certificates for everybody in a cluster."""

from pathlib import Path
from typing import Annotated

import typer


def certs(
    folder: Annotated[Path, typer.Argument(help="Where to write them; made if need be.")],
    host: Annotated[
        list[str] | None,
        typer.Option(help="Another name or address of the server, besides localhost; may be repeated."),
    ] = None,
    days: Annotated[int, typer.Option(min=1, max=825, help="How long they are valid.")] = 90,
) -> None:
    """Make certificates for development: two authorities, a server, workers and a client.

    Nothing is overwritten. In production, take your own authority's.
    """
    from pdserve.core.security.dev_certs import make_certificates

    made = make_certificates(folder, host or (), days)
    for path in made:
        typer.echo(path)
    typer.echo(f"valid for {days} days; serve with: pdserve serve --tls-dir {folder}")
