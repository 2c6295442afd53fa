"""A model's configuration without its weights. No torch: the supervisor and the CLI ask, too."""

from pathlib import Path

from pdserve.core.errors import ConfigError
from pdserve.core.gguf_header import GgufHeader
from pdserve.workers.models.config import ModelConfig
from pdserve.workers.models.gguf_config import config_from_gguf
from pdserve.workers.models.hf_config import config_from_folder


def load_config(path: Path) -> ModelConfig:
    """Of a folder with config.json, or of a `.gguf` file (its header is read whole).

    Raises:
        ConfigError: neither of them, unreadable, or a model that the decoder does not compute.
    """
    if path.is_dir():
        return config_from_folder(path)
    if path.suffix == ".gguf" and path.is_file():
        return config_from_gguf(GgufHeader.read(path))
    raise ConfigError(f"{path} is neither a model folder nor a .gguf file")
