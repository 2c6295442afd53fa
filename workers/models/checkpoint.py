"""One view of a model's files, whatever their format."""

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch

from pdserve.core.errors import ConfigError
from pdserve.workers.models.config import ModelConfig
from pdserve.workers.models.gguf_loader import GgufCheckpoint
from pdserve.workers.models.safetensors_loader import SafetensorsCheckpoint


class Checkpoint(Protocol):
    """A model's configuration and weights, read from disk."""

    @property
    def config(self) -> ModelConfig: ...

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (Hugging Face name, CPU tensor in a floating dtype) once per tensor, in file order.

        A tensor may alias the mapped file: copy it before the next one is asked for.

        Raises:
            ConfigError: a file is missing, truncated or in an unsupported dtype.
        """
        ...


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a folder with config.json and safetensors, or a `.gguf` file.

    Raises:
        ConfigError: neither of them, or unreadable.
    """
    if path.is_dir():
        return SafetensorsCheckpoint(path)
    if path.suffix == ".gguf" and path.is_file():
        return GgufCheckpoint(path)
    raise ConfigError(f"{path} is neither a model folder nor a .gguf file")


def load_config(path: Path) -> ModelConfig:
    """Only the configuration of the model at `path` (for GGUF this parses the whole header)."""
    return open_checkpoint(path).config
