"""Whether a tokenizer belongs to the weights beside it."""

from pathlib import Path

from pdserve.core.errors import ConfigError
from pdserve.core.text.tokenizer import Tokenizer
from pdserve.workers.models.config import ModelConfig, check_special_ids


def check_tokenizer(config: ModelConfig, tokenizer: Tokenizer, path: Path) -> None:
    """An id without a row in the embedding would end the engine's step, not only its request.

    Raises:
        ConfigError: more ids than rows, or an end-of-sequence id past them.
    """
    source = path / "tokenizer.json" if (path / "tokenizer.json").is_file() else path
    if tokenizer.vocab_size > config.vocab_size:
        raise ConfigError(
            f"{source} does not match the model: it has {tokenizer.vocab_size} token ids, the embedding "
            f"{config.vocab_size} rows; take tokenizer and weights from one download"
        )
    check_special_ids(source, config.vocab_size, {"end-of-sequence id": tuple(sorted(tokenizer.eos_ids))})
