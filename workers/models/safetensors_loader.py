"""Weights from a Hugging Face folder: one model.safetensors, or shards named by an index."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from pdserve.core.errors import ConfigError
from pdserve.workers.models.config import ModelConfig, unsupported
from pdserve.workers.models.hf_config import config_from_folder

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class SafetensorsCheckpoint:
    """A folder with config.json and safetensors files."""

    def __init__(self, folder: Path) -> None:
        self.config: ModelConfig = config_from_folder(folder)
        self._shards = _shards(folder)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for file, expected in self._shards.items():
            yield from _tensors_of(file, expected)


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
            raise ConfigError(f"{folder} has neither {_SINGLE} nor {_INDEX}")
        return {folder / _SINGLE: None}
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names: dict[str, set[str]] = {}
        for tensor, file in weight_map.items():
            names.setdefault(file, set()).add(tensor)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{index} is not a safetensors index: {type(error).__name__}: {error}") from error
    for file in names:
        if Path(file).name != file:
            raise ConfigError(f"{index} names {file!r}, which is not a plain file name")
        if not (folder / file).is_file():
            raise ConfigError(f"{index} names {file}, which is not in the folder")
    return {folder / file: frozenset(tensors) for file, tensors in sorted(names.items())}


def _tensors_of(file: Path, expected: frozenset[str] | None) -> Iterator[tuple[str, torch.Tensor]]:
    try:
        reader: Any = safe_open(str(file), framework="pt")
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"cannot read {file}, truncated or not safetensors: {error}") from error
    with reader:
        present = reader.keys()
        lost = (expected or frozenset()).difference(present)
        if lost:
            raise ConfigError(f"{file} lacks {min(lost)}, which the index promises in it")
        for name in present:
            tensor = reader.get_tensor(name)
            if tensor.dtype not in _DTYPES:
                raise unsupported(file, f"dtype {tensor.dtype} of {name}")
            yield name, tensor
