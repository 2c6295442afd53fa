"""The header of a GGUF file: its metadata, and where its tensors lie.

The `gguf` package makes a numpy view of every array element, which takes seconds for a vocabulary; the header
is a flat little-endian record (GGUF specification, versions 2 and 3) that is read here in one pass.
"""

import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from pdserve.core.errors import ConfigError

_MAGIC: Final = b"GGUF"
_VERSIONS: Final = (2, 3)
_MOST_DIMENSIONS: Final = 4
_ALIGNMENT: Final = 32
"""Of the tensor data, where the file does not say."""
_STRING: Final = 8
_ARRAY: Final = 9
_SCALARS: Final[dict[int, str]] = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
"""GGUF value type number to the struct format of one little-endian value."""


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where one tensor lies. `shape` is innermost first, as the format has it."""

    name: str
    shape: tuple[int, ...]
    type_number: int
    """ggml's number of the element type."""
    offset: int
    """Bytes from the start of the file."""


class GgufHeader:
    """Typed access to a GGUF header. Every accessor raises ConfigError where a value has another type."""

    def __init__(self, path: Path, values: dict[str, object], tensors: tuple[GgufTensor, ...] = ()) -> None:
        self.path = path
        self.tensors = tensors
        self._values = values

    @classmethod
    def read(cls, path: Path) -> "GgufHeader":
        """Read the header of `path`.

        Raises ConfigError when the file is missing, is not GGUF, or ends inside its header.
        """
        try:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return cls(path, *_HeaderReader(data).read())
        except (OSError, ValueError, struct.error, RecursionError) as error:
            raise ConfigError(
                f"cannot read the GGUF header of {path}, truncated or not GGUF: {error}; check the path or "
                "download the model again"
            ) from error

    def string(self, key: str) -> str | None:
        """The string at `key`, None where the file does not say."""
        value = self._values.get(key)
        if value is None or isinstance(value, str):
            return value
        raise self._wrong_type(key, value, "a string")

    def integer(self, key: str) -> int | None:
        """The integer at `key`, None where the file does not say."""
        value = self._values.get(key)
        if value is None or (isinstance(value, int) and not isinstance(value, bool)):
            return value
        raise self._wrong_type(key, value, "an integer")

    def number(self, key: str) -> float | None:
        """The number at `key`, None where the file does not say."""
        value = self._values.get(key)
        if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
            return value
        raise self._wrong_type(key, value, "a number")

    def has(self, key: str) -> bool:
        """Whether the file says anything at `key`."""
        return key in self._values

    def flag(self, key: str) -> bool | None:
        """The boolean at `key`, None where the file does not say."""
        value = self._values.get(key)
        if value is None or isinstance(value, bool):
            return value
        raise self._wrong_type(key, value, "a boolean")

    def strings(self, key: str) -> list[str]:
        """The array of strings at `key`, empty where the file does not say."""
        value = self._values.get(key, [])
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return value
        raise self._wrong_type(key, value, "an array of strings")

    def integers(self, key: str) -> list[int]:
        """The array of integers at `key`, empty where the file does not say."""
        value = self._values.get(key, [])
        if isinstance(value, list) and all(isinstance(item, int) for item in value):
            return value
        raise self._wrong_type(key, value, "an array of integers")

    def numbers(self, key: str) -> list[float]:
        """The array of numbers at `key`, empty where the file does not say."""
        value = self._values.get(key, [])
        if isinstance(value, list) and all(isinstance(item, int | float) for item in value):
            return value
        raise self._wrong_type(key, value, "an array of numbers")

    def _wrong_type(self, key: str, value: object, wanted: str) -> ConfigError:
        return ConfigError(f"{self.path}: {key} is {type(value).__name__}, expected {wanted}")


class _HeaderReader:
    """One pass over the header; owns the cursor. Lives only as long as the mapping that it reads."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = 0

    def read(self) -> tuple[dict[str, object], tuple[GgufTensor, ...]]:
        magic = self._take(4)
        if magic != _MAGIC:
            raise ValueError(f"it starts with {magic!r}, not with {_MAGIC!r}")
        version = self._number("I")
        if version not in _VERSIONS:
            raise ValueError(f"version {version} is not one of {_VERSIONS}")
        tensors, entries = self._number("Q"), self._number("Q")
        values = {self._string(): self._value(self._number("I")) for _ in range(entries)}
        infos = [self._tensor() for _ in range(tensors)]
        alignment = values.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"general.alignment is {alignment!r}")
        data_at = -(-self._at // alignment) * alignment
        return values, tuple(replace(info, offset=data_at + info.offset) for info in infos)

    def _tensor(self) -> GgufTensor:
        name = self._string()
        dimensions = self._number("I")
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise ValueError(f"tensor {name} has {dimensions} dimensions, must have 1 to {_MOST_DIMENSIONS}")
        shape = tuple(self._number("Q") for _ in range(dimensions))
        return GgufTensor(name, shape, self._number("I"), self._number("Q"))

    def _value(self, kind: int) -> object:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array(self._number("I"), self._number("Q"))
        return self._unpack("<" + self._scalar(kind))[0]

    def _array(self, kind: int, count: int) -> list[object]:
        if kind not in (_STRING, _ARRAY):
            self._require(count * struct.calcsize("<" + self._scalar(kind)))
            return list(self._unpack(f"<{count}{self._scalar(kind)}"))
        item: Callable[[], object] = self._string if kind == _STRING else lambda: self._value(_ARRAY)
        return [item() for _ in range(count)]

    def _string(self) -> str:
        return self._take(self._number("Q")).decode("utf-8", errors="replace")

    def _number(self, code: str) -> int:
        value: int = self._unpack("<" + code)[0]
        return value

    def _unpack(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from(layout, self._data, self._at)
        self._at += struct.calcsize(layout)
        return values

    def _take(self, size: int) -> bytes:
        self._require(size)
        start, self._at = self._at, self._at + size
        return self._data[start : self._at]

    def _require(self, size: int) -> None:
        left = len(self._data) - self._at
        if size > left:
            raise ValueError(f"it ends inside its header: {size} bytes wanted, {left} left")

    @staticmethod
    def _scalar(kind: int) -> str:
        code = _SCALARS.get(kind)
        if code is None:
            raise ValueError(f"unknown value type {kind}")
        return code
