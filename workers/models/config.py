"""What a decoder is, independent of the file format that says so."""

import math
from dataclasses import dataclass
from typing import Final

from pdserve.core.errors import ConfigError
from pdserve.core.types import BLOCK_TOKENS
from pdserve.workers.models.families import Family, known_models
from pdserve.workers.models.rope_scaling import Rope

_LARGEST: Final = {
    "vocab_size": 1 << 22,
    "hidden_size": 1 << 18,
    "intermediate_size": 1 << 18,
    "num_layers": 1 << 10,
    "num_heads": 1 << 12,
    "num_kv_heads": 1 << 12,
    "head_dim": 1 << 12,
    "max_position_embeddings": (1 << 31) - 1,
}
"""Far above any model: a larger number is a damaged file, and would be memory that nobody has."""


@dataclass(frozen=True, slots=True)
class LayerKind:
    """How one layer's attention sees positions."""

    rope: Rope | None
    """None: the layer's queries and keys are not rotated (SmolLM3's no-rope layers)."""
    window: int | None
    """Tokens that a query sees, its own included; None: all."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder of one of the known families: RMS norm, grouped-query attention, gated MLP.

    Raises:
        ConfigError: the numbers do not fit together.
    """

    family: Family
    vocab_size: int
    """Rows of the embedding."""
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layers: tuple[LayerKind, ...]
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool
    """q, k and v projections have a bias."""
    output_bias: bool
    """The attention's output projection has a bias (Qwen2 has only the other three)."""
    mlp_bias: bool
    attention_scale: float
    """Scores are multiplied by it: head_dim ** -0.5 in most families."""
    attention_soft_cap: float | None
    """Scores s become cap x tanh(s / cap)."""
    final_soft_cap: float | None
    """The same, of the logits."""
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    """Tokens that end a sequence; may be empty."""

    def __post_init__(self) -> None:
        for name in _LARGEST:
            check_size(self.architecture, name, getattr(self, name))
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"{self.architecture}: {self.num_heads} attention heads do not divide into "
                f"{self.num_kv_heads} key-value heads"
            )
        if self.head_dim % 2:
            raise ConfigError(f"{self.architecture}: head_dim {self.head_dim} is odd, rotary needs pairs")
        for name in ("rms_norm_eps", "attention_scale", "attention_soft_cap", "final_soft_cap"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{self.architecture}: {name} is {value}, must be above 0 and finite")

    @property
    def architecture(self) -> str:
        """As transformers names it."""
        return self.family.architecture

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def kv_shape(self, num_blocks: int) -> tuple[int, int, int, int, int, int]:
        """Shape of a pool's tensor: [blocks, layers, K|V, kv heads, tokens of a block, head_dim]."""
        return (num_blocks, self.num_layers, 2, self.num_kv_heads, BLOCK_TOKENS, self.head_dim)


def check_size(source: object, name: str, value: int) -> None:
    """Raises ConfigError for a size, by its name in ModelConfig, that no model has."""
    if not 1 <= value <= _LARGEST[name]:
        bound = "at least 1" if value < 1 else f"at most {_LARGEST[name]}"
        raise ConfigError(f"{source}: {name} is {value}, must be {bound}")


def own_window(window: int | None, context: int) -> int | None:
    """A window that the context never outgrows is none."""
    return None if window is None or window >= context else window


def check_special_ids(source: object, vocab_size: int, ids: dict[str, tuple[int, ...]]) -> None:
    """Raises ConfigError for an id (by its key in `source`) that the embedding has no row for."""
    for key, numbers in ids.items():
        for number in numbers:
            if not 0 <= number < vocab_size:
                raise ConfigError(
                    f"{source}: {key} {number} is outside the model's {vocab_size} token ids (0 to "
                    f"{vocab_size - 1}); correct it, or take this file and the weights from one download"
                )


def unsupported(source: object, found: str) -> ConfigError:
    """The error for a model that this decoder would compute wrongly: what was found, what is supported."""
    return ConfigError(f"{source}: {found} is not supported; {known_models()}")
