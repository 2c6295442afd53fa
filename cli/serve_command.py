"""`pdserve serve`: flags and TOML become one ServeConfig, and a cluster of it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from pdserve.cli.gathering import gathers
from pdserve.cli.serve_flags import SERVE_FLAGS, resolve_flags


@gathers("flags", [flag.parameter() for flag in SERVE_FLAGS])
def serve(
    flags: Mapping[str, Any],
    config: Annotated[
        Path | None, typer.Option(help="TOML file; flags win over it. `pdserve config` shows every key.")
    ] = None,
) -> None:
    """Run a cluster until SIGINT or SIGTERM."""
    # Before the heavy import, so that a wrong flag is answered at once.
    resolved = resolve_flags(config, flags)
    from pdserve.cluster.serve import serve as run_cluster

    raise typer.Exit(run_cluster(resolved.config))
