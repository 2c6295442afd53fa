"""The flags of `pdserve serve` and `pdserve config`: the few values that are changed most, by their keys."""

import inspect
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pdserve.cli.gathering import option
from pdserve.core.config import ServeConfig, to_mapping, value_types
from pdserve.core.config_sources import Override, Resolved, resolve, value_at


@dataclass(frozen=True, slots=True)
class ServeFlag:
    """One flag. Its type and its default are those of the configuration's value."""

    name: str
    key: str
    """Dotted key of the value."""
    help: str
    unset: str = ""
    """What happens where the default is None."""

    @property
    def flag(self) -> str:
        """As users write it."""
        return f"--{self.name.replace('_', '-')}"

    def parameter(self) -> inspect.Parameter:
        """The flag for typer; None where it is not given."""
        default = value_at(to_mapping(ServeConfig()), self.key)
        hint = dict(value_types())[self.key]
        kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        (kind,) = (kind for kind in kinds if kind is not type(None))
        shown = self.unset if default is None else str(default)
        flags = (f"{self.flag}/--no-{self.flag[2:]}",) if kind is bool else (self.flag,)
        return option(self.name, kind | None, self.help, show_default=shown, flags=flags)


SERVE_FLAGS = (
    ServeFlag("model", "model", "Model folder, .gguf file or id."),
    ServeFlag("prefill", "prefill", "Prefill workers."),
    ServeFlag("decode", "decode", "Decode workers."),
    ServeFlag("mixed", "mixed", "Workers that do both; alone: only these."),
    ServeFlag("dtype", "dtype", "float32 or bfloat16."),
    ServeFlag(
        "transport", "handoff.transport", "How KV blocks travel: auto, inproc, cuda_ipc, nccl, shm or tcp."
    ),
    ServeFlag(
        "disaggregation",
        "router.disaggregation",
        "When prefill workers compute prompts: cost, always, never.",
    ),
    ServeFlag("host", "router.host", "Address to listen on."),
    ServeFlag("grpc_port", "router.grpc_port", "Port of the gRPC API; 0 picks a free one."),
    ServeFlag(
        "http_port", "router.http_port", "Port of the OpenAI HTTP API; 0 picks a free one.", "not served"
    ),
    ServeFlag(
        "tls_dir", "security.tls_dir", "Folder of `pdserve certs`: encrypt and check all.", "plain text"
    ),
    ServeFlag(
        "tokens_file", "security.tokens_file", "Bearer tokens to ask for, see docs/security.md.", "none"
    ),
    ServeFlag("ready_file", "ready_file", "File to write, as JSON, once every worker is ready.", "none"),
    ServeFlag("ray_address", "ray_address", "Ray cluster to join.", "a local one of its own"),
    ServeFlag("redis_url", "index.redis_url", "Redis of the block index.", "one of its own"),
    ServeFlag("pool_blocks", "engine.pool_blocks", "KV blocks of 16 tokens per worker."),
    ServeFlag("threads", "engine.threads", "Arithmetic threads per worker."),
    ServeFlag("drain_grace", "drain_grace_s", "Seconds that a draining worker may finish its streams in."),
)


def resolve_flags(path: Path | None, flags: Mapping[str, Any]) -> Resolved:
    """Defaults, then the TOML file, then flags that are not None. Raises ConfigError.

    `--mixed K` alone, without a file, is an aggregated cluster: no prefill and no decode workers beside it.
    """
    by_name = {flag.name: flag for flag in SERVE_FLAGS}
    given = {name: value for name, value in flags.items() if value is not None}
    overrides = {by_name[name].key: Override(value, by_name[name].flag) for name, value in given.items()}
    if path is None and given.get("mixed") and not given.keys() & {"prefill", "decode"}:
        overrides |= {role: Override(0, "--mixed") for role in ("prefill", "decode")}
    return resolve(path, overrides)
