"""Weights from a Hugging Face folder: one model.safetensors, or shards named by an index."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from pdserve.core.errors import ConfigError
from pdserve.workers.models.config import ModelConfig, unsupported
from pdserve.workers.models.hf_config import config_from_folder
from pdserve.workers.models.stored_tensor import StoredTensor

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
"""Element types that are read, as safetensors names them."""
_OTHER_FORMATS = ("*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack")


class SafetensorsCheckpoint:
    """A folder with config.json and safetensors files."""

    def __init__(self, folder: Path) -> None:
        self.config: ModelConfig = config_from_folder(folder)
        self._shards = _shards(folder)
        self.files = tuple(self._shards)

    def stored(self) -> Iterator[StoredTensor]:
        for file, expected in self._shards.items():
            with _opened(file, expected) as reader:
                for name in reader.keys():  # noqa: SIM118 - not a dict
                    piece = reader.get_slice(name)
                    kind, shape = piece.get_dtype(), tuple(piece.get_shape())
                    if kind not in _ITEM_BYTES:
                        raise unsupported(file, f"dtype {kind} of {name}")
                    yield StoredTensor(name, shape, kind, math.prod(shape) * _ITEM_BYTES[kind])

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for file, expected in self._shards.items():
            with _opened(file, expected) as reader:
                for name in reader.keys():  # noqa: SIM118 - not a dict
                    kind = reader.get_slice(name).get_dtype()
                    if kind not in _ITEM_BYTES:
                        raise unsupported(file, f"dtype {kind} of {name}")
                    yield name, reader.get_tensor(name)


def weight_files(folder: Path) -> list[Path]:
    """The folder's safetensors files, sorted by name.

    Raises:
        ConfigError: none, or one that the index names is missing.
    """
    return sorted(_shards(folder))


def _shards(folder: Path) -> dict[Path, frozenset[str] | None]:
    """File to the tensor names that the index promises in it; None where there is no index."""
    index = folder / _INDEX
    if not index.is_file():
        if not (folder / _SINGLE).is_file():
            raise ConfigError(_no_weights(folder))
        return {folder / _SINGLE: None}
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names: dict[str, set[str]] = {}
        for tensor, file in weight_map.items():
            if not isinstance(file, str):
                raise TypeError(f"{tensor} is in {file!r}, which is no file name")
            names.setdefault(file, set()).add(tensor)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(
            f"{index} is not a safetensors index ({type(error).__name__}: {error}): download it again"
        ) from error
    for file in names:
        if Path(file).name != file:
            raise ConfigError(f"{index} names {file!r}, which is not a plain file name")
        if not (folder / file).is_file():
            raise ConfigError(
                f"{index} names {file}, which is not in the folder: {len(names)} files are needed, download "
                "the missing ones"
            )
    return {folder / file: frozenset(tensors) for file, tensors in sorted(names.items())}


def _no_weights(folder: Path) -> str:
    said = f"{folder} has no weights: neither {_SINGLE} nor {_INDEX}"
    other = sorted(file.name for pattern in _OTHER_FORMATS for file in folder.glob(pattern))
    if other:
        return f"{said}, only {other[0]}, which is not read: convert the model to safetensors"
    return f"{said}; download the model's safetensors into it"


def _opened(file: Path, expected: frozenset[str] | None) -> Any:
    """A reader of the file, to be used in `with`; it holds all tensors that the index promises."""
    try:
        reader: Any = safe_open(str(file), framework="pt")
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            f"cannot read {file}, truncated or not safetensors: {error}; download the file again"
        ) from error
    lost = (expected or frozenset()).difference(reader.keys())
    if lost:
        raise ConfigError(
            f"{file} lacks {min(lost)}, which the index promises in it: download file and index again"
        )
    return reader
