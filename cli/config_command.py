"""`pdserve config`: the configuration that `pdserve serve` would run, and where each value comes from."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pdserve.cli.gathering import gathers
from pdserve.cli.serve_flags import SERVE_FLAGS, resolve_flags

if TYPE_CHECKING:
    from pdserve.core.config_sources import Resolved


@gathers("flags", [flag.parameter() for flag in SERVE_FLAGS])
def config(
    flags: Mapping[str, Any],
    file: Annotated[
        Path | None, typer.Argument(help="TOML file; flags win over it.", show_default="none")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print the resolved configuration as TOML, each value with its source. Starts nothing.

    What is printed can be given to `pdserve serve --config`.
    """
    resolved = resolve_flags(file, flags)
    typer.echo(_as_json(resolved) if as_json else as_toml(resolved), nl=False)


def as_toml(resolved: "Resolved") -> str:
    """Every value with its source as a comment; what is None, which TOML cannot say, is a comment too."""
    lines: list[tuple[str, str]] = []
    table = ""
    for key, value, source in resolved.values():
        place, _, name = key.rpartition(".")
        if place != table:
            lines += [("", ""), (f"[{place}]", "")]
            table = place
        shown = _shown(key, value)
        lines.append((f"# {name} is not set" if value is None else f"{name} = {_toml(shown)}", str(source)))
    width = max(len(text) for text, _ in lines)
    return "".join(f"{text:{width}}  # {source}\n" if source else f"{text}\n" for text, source in lines)


def _as_json(resolved: "Resolved") -> str:
    values = {
        key: {"value": _shown(key, value), "source": str(source.kind), "where": source.where or None}
        for key, value, source in resolved.values()
    }
    return json.dumps(values, ensure_ascii=False, indent=2) + "\n"


def _shown(key: str, value: Any) -> Any:
    """A value without the passwords that a URL in it may have."""
    is_url = isinstance(value, str) and ("://" in value or key.endswith("_url"))
    return without_password(value) if is_url else value


def without_password(url: str) -> str:
    """With `***` for its passwords.

    It is not parsed: what is no valid URL, because its password has a `/` or a `#`, holds that password, too.
    """
    url = re.sub(r"(?i)(?<=password=)[^&]*", "***", url)
    return re.sub(r"^(\w+://)?+([^:@]*):.*@", r"\1\2:***@", url, flags=re.DOTALL)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    return repr(value)
