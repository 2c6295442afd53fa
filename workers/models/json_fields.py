"""Typed reads of a model's JSON files."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pdserve.core.errors import ConfigError


class JsonFields:
    """A JSON object; null counts as absent, as in transformers. Every error names the file and the key."""

    def __init__(self, raw: Mapping[str, Any], source: Path) -> None:
        self._raw = raw
        self.source = source

    @classmethod
    def read(cls, path: Path) -> "JsonFields":
        """Raises ConfigError when the file is missing or holds no JSON object."""
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"cannot read {path} ({error.strerror}): complete the model folder") from error
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path} is not JSON ({error}): download it again") from error
        if not isinstance(raw, dict):
            raise ConfigError(f"{path} holds no JSON object: download it again")
        return cls(raw, path)

    def get(self, key: str) -> Any:
        return self._raw.get(key)

    def has(self, key: str) -> bool:
        """Whether the key is there, be it null."""
        return key in self._raw

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(f"{self.source}: {key} is {value!r}, must be an integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"{self.source}: {key} is {value!r}, must be a number")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise ConfigError(f"{self.source}: {key} is {number}, must be finite")
        return number

    def boolean(self, key: str, default: bool) -> bool:
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise ConfigError(f"{self.source}: {key} is {value!r}, must be true or false")
        return value

    def section(self, key: str) -> "JsonFields":
        """A nested object; an absent one reads as empty."""
        value = self._raw.get(key)
        if value is not None and not isinstance(value, dict):
            raise ConfigError(f"{self.source}: {key} is {value!r}, must be an object")
        return JsonFields(value or {}, self.source)

    def per_layer(self, key: str, layers: int) -> list[Any] | None:
        """A list with an entry for each layer, longer ones cut; None where it is absent."""
        value = self._raw.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) < layers:
            found = f"{len(value)} entries" if isinstance(value, list) else repr(value)
            raise ConfigError(f"{self.source}: {key} is {found}, must be a list of {layers}, one per layer")
        return value[:layers]

    def token_ids(self, key: str) -> tuple[int, ...]:
        value = self._raw.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
            raise ConfigError(f"{self.source}: {key} is {value!r}, must be a token id or a list of them")
        return tuple(ids)

    def _value(self, key: str, default: object) -> Any:
        value = self._raw.get(key)
        if value is not None:
            return value
        if default is None:
            raise ConfigError(f"{self.source}: {key} is missing")
        return default
