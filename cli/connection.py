"""Which cluster the client commands talk to, and how."""

from typing import Annotated

import typer

DEFAULT_TARGET = "127.0.0.1:50051"

Target = Annotated[str, typer.Option(help="host:port of the cluster's gRPC API.")]
Model = Annotated[str, typer.Option(help="Needed only where several are served.")]
