"""One view of a model's files, whatever their format."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from pdserve.core.errors import ConfigError
from pdserve.workers.models.config import ModelConfig
from pdserve.workers.models.gguf_loader import GgufCheckpoint
from pdserve.workers.models.safetensors_loader import SafetensorsCheckpoint
from pdserve.workers.models.stored_tensor import StoredTensor

if TYPE_CHECKING:
    import torch


class Checkpoint(Protocol):
    """A model's configuration and weights, read from disk."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold weights."""
        ...

    def stored(self) -> Iterator[StoredTensor]:
        """Every tensor as the files' headers tell of it; no weights are read.

        Raises:
            ConfigError: a file is missing, truncated or in an unsupported dtype.
        """
        ...

    def tensors(self) -> Iterator[tuple[str, "torch.Tensor"]]:
        """Yield (Hugging Face name, CPU tensor in a floating dtype) once per tensor, in file order.

        A tensor may alias the mapped file: copy it before the next one is asked for.

        Raises:
            ConfigError: as for `stored`.
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
