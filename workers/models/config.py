"""What a decoder is, independent of the file format that says so."""

from dataclasses import dataclass

from pdserve.core.errors import ConfigError
from pdserve.core.types import BLOCK_TOKENS

SUPPORTED_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")


@dataclass(frozen=True, slots=True)
class Llama3RopeScaling:
    """Llama 3.1's stretching of the low rotary frequencies.

    Wavelengths above `original_max_position_embeddings / low_freq_factor` are divided by `factor`, those
    below `original_max_position_embeddings / high_freq_factor` are kept, those between are blended.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A llama-like decoder: RMS norm, rotary positions, grouped-query attention, gated SiLU MLP.

    Raises:
        ConfigError: the numbers do not fit together.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: Llama3RopeScaling | None
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool
    """q, k and v projections have a bias (Qwen2 always)."""
    output_bias: bool
    """The attention's output projection has a bias (Llama's `attention_bias` covers it, Qwen2's does not)."""
    mlp_bias: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    """Tokens that end a sequence; may be empty."""

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_position_embeddings",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{self.architecture}: {name} is {getattr(self, name)}, must be at least 1")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"{self.architecture}: {self.num_heads} attention heads do not divide into "
                f"{self.num_kv_heads} key-value heads"
            )
        if self.head_dim % 2:
            raise ConfigError(f"{self.architecture}: head_dim {self.head_dim} is odd, rotary needs pairs")

    def kv_shape(self, num_blocks: int) -> tuple[int, int, int, int, int, int]:
        """Shape of a pool's tensor: [blocks, layers, K|V, kv heads, tokens of a block, head_dim]."""
        return (num_blocks, self.num_layers, 2, self.num_kv_heads, BLOCK_TOKENS, self.head_dim)


def unsupported(source: object, found: str) -> ConfigError:
    """The error for a model that this decoder would compute wrongly: what was found, what is supported."""
    return ConfigError(
        f"{source}: {found} is not supported; supported are {', '.join(SUPPORTED_ARCHITECTURES)} and GGUF "
        "architectures llama and qwen2, with full attention, SiLU, default or llama3 rope, and weights in "
        "float32, float16 or bfloat16 (GGUF also Q8_0, Q4_0, Q4_1)"
    )
