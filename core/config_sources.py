"""Where each value of the configuration comes from: the default, a line of the TOML file, or a flag."""

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from pdserve.core.config import ServeConfig, WrongKey, from_mapping, to_mapping, value_types
from pdserve.core.errors import ConfigError


class SourceKind(StrEnum):
    """In order: each wins over those before it."""

    DEFAULT = "default"
    FILE = "file"
    FLAG = "flag"


@dataclass(frozen=True, slots=True)
class Source:
    """Where one value comes from."""

    kind: SourceKind
    where: str = ""
    """`FILE:LINE` or `--FLAG`; empty for a default."""

    def __str__(self) -> str:
        return self.where or str(self.kind)


DEFAULT = Source(SourceKind.DEFAULT)


@dataclass(frozen=True, slots=True)
class Override:
    """A value that a flag gives."""

    value: Any
    flag: str
    """As it was written: `--prefill`."""


@dataclass(frozen=True, slots=True)
class Resolved:
    """A configuration and the source of each of its values."""

    config: ServeConfig
    sources: Mapping[str, Source]
    """By dotted key, in the order of the dataclasses; every value has one."""

    def values(self) -> Iterator[tuple[str, Any, Source]]:
        """(dotted key, value, source) of every value, in order."""
        mapping = to_mapping(self.config)
        for key, source in self.sources.items():
            yield key, value_at(mapping, key), source


def resolve(path: Path | None, overrides: Mapping[str, Override]) -> Resolved:
    """Defaults, then the file, then `overrides` by dotted key.

    Raises ConfigError: no such file, not TOML, an unknown key, a value of a wrong type or out of its bounds.
    The message begins with the file and line, or the flag, that is to be changed.
    """
    values: dict[str, Any] = {}
    sources: dict[str, Source] = {}
    if path is not None:
        text = _read(path)
        values = _parse(path, text)
        for key, line in key_lines(text).items():
            sources[key] = Source(SourceKind.FILE, f"{path}:{line}")
    for key, override in overrides.items():
        _put(values, key, override.value)
        sources[key] = Source(SourceKind.FLAG, override.flag)
    try:
        config = from_mapping(ServeConfig, values)
    except WrongKey as error:
        place = sources.get(error.key, "" if path is None else path)
        raise WrongKey(error.key, f"{place}: {error.message}" if place else error.message) from error
    return Resolved(config, {key: sources.get(key, DEFAULT) for key, _ in value_types()})


def value_at(mapping: Mapping[str, Any], key: str) -> Any:
    """The value of a dotted key in nested mappings."""
    found: Any = mapping
    for name in key.split("."):
        found = found[name]
    return found


def key_lines(text: str) -> dict[str, int]:
    """Dotted keys of a valid TOML document, tables included, to the lines, from 1, on which they begin.

    The document is cut where a piece is a document by itself: a header or one `key = value`.
    """
    lines: dict[str, int] = {}
    table, piece, start = "", "", 1
    for number, line in enumerate(text.split("\n"), start=1):
        piece += line + "\n"
        try:
            parsed = tomllib.loads(piece)
        except tomllib.TOMLDecodeError:
            continue  # in the middle of a value of several lines
        keys = list(_dotted(parsed))
        is_header = piece.lstrip().startswith("[")
        if is_header:
            table = keys[-1] if keys else ""
        for key in keys:
            lines.setdefault(key if is_header or not table else f"{table}.{key}", start)
        piece, start = "", number + 1
    return lines


def _dotted(values: Mapping[str, Any], where: str = "") -> Iterator[str]:
    """Keys of tables come before the keys in them."""
    for name, value in values.items():
        key = f"{where}.{name}" if where else name
        yield key
        if isinstance(value, Mapping):
            yield from _dotted(value, key)


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except FileNotFoundError as error:
        raise ConfigError(f"no configuration file at {path}") from error
    except OSError as error:
        raise ConfigError(f"cannot read the configuration file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: it is not UTF-8, see byte {error.start}") from error


def _parse(path: Path, text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key. What the file has in place of a table is left for `from_mapping` to refuse."""
    *tables, name = key.split(".")
    place: Any = values
    for table in tables:
        place = place.setdefault(table, {})
        if not isinstance(place, dict):
            return
    place[name] = value
