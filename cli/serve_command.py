"""`pdserve serve`: flags and TOML become one ServeConfig."""

from pathlib import Path
from typing import Annotated, Any

import typer

from pdserve.core.config import ServeConfig, from_mapping, load_toml

PATHS = {
    "model": ("model",),
    "dtype": ("dtype",),
    "prefill": ("prefill",),
    "decode": ("decode",),
    "mixed": ("mixed",),
    "ray_address": ("ray_address",),
    "ready_file": ("ready_file",),
    "drain_grace": ("drain_grace_s",),
    "transport": ("handoff", "transport"),
    "host": ("router", "host"),
    "grpc_port": ("router", "grpc_port"),
    "pool_blocks": ("engine", "pool_blocks"),
    "threads": ("engine", "threads"),
    "redis_url": ("index", "redis_url"),
}
"""Flag to its place in the configuration."""


def serve_config(config: Path | None, flags: dict[str, Any]) -> ServeConfig:
    """Defaults, then the TOML file, then flags that are not None.

    `--mixed K` alone, without a file, is an aggregated cluster: no prefill and no decode workers beside it.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    if config is None and given.get("mixed") and not given.keys() & {"prefill", "decode"}:
        given |= {"prefill": 0, "decode": 0}
    overrides: dict[str, Any] = {}
    for name, value in given.items():
        *tables, key = PATHS[name]
        place = overrides
        for table in tables:
            place = place.setdefault(table, {})
        place[key] = value
    return from_mapping(ServeConfig, overrides) if config is None else load_toml(config, overrides)


def serve(
    model: Annotated[
        str | None, typer.Option(help="Model folder, .gguf file or id.", show_default="smollm2-135m")
    ] = None,
    prefill: Annotated[int | None, typer.Option(help="Prefill workers.", show_default="1")] = None,
    decode: Annotated[int | None, typer.Option(help="Decode workers.", show_default="1")] = None,
    mixed: Annotated[
        int | None, typer.Option(help="Workers that do both; alone: only these.", show_default="0")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16.", show_default="float32")] = None,
    transport: Annotated[
        str | None, typer.Option(help="How KV blocks travel: auto, shm or tcp.", show_default="auto")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.", show_default="127.0.0.1")] = None,
    grpc_port: Annotated[
        int | None, typer.Option(help="Port of the gRPC API; 0 picks a free one.", show_default="50051")
    ] = None,
    ready_file: Annotated[
        str | None, typer.Option(help="File to write, as JSON, once every worker is ready.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file; flags win over it.")] = None,
    ray_address: Annotated[
        str | None, typer.Option(help="Ray cluster to join.", show_default="a local one of its own")
    ] = None,
    redis_url: Annotated[
        str | None, typer.Option(help="Redis of the block index.", show_default="one of its own")
    ] = None,
    pool_blocks: Annotated[
        int | None, typer.Option(help="KV blocks of 16 tokens per worker.", show_default="1024")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="Arithmetic threads per worker.", show_default="1")
    ] = None,
    drain_grace: Annotated[
        float | None,
        typer.Option(help="Seconds that a draining worker may finish its streams in.", show_default="30"),
    ] = None,
) -> None:
    """Run a cluster until SIGINT or SIGTERM."""
    flags = {
        "model": model,
        "prefill": prefill,
        "decode": decode,
        "mixed": mixed,
        "dtype": dtype,
        "transport": transport,
        "host": host,
        "grpc_port": grpc_port,
        "ready_file": ready_file,
        "ray_address": ray_address,
        "redis_url": redis_url,
        "pool_blocks": pool_blocks,
        "threads": threads,
        "drain_grace": drain_grace,
    }
    # Before the heavy import, so that a wrong flag is answered at once.
    resolved = serve_config(config, flags)
    from pdserve.cluster.serve import serve as run_cluster

    raise typer.Exit(run_cluster(resolved))
