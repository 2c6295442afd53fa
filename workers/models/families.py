"""The model families that the one decoder computes, and in what they differ."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Activation(StrEnum):
    """Of the MLP's gate."""

    SILU = "silu"
    GELU_TANH = "gelu_pytorch_tanh"


@dataclass(frozen=True, slots=True)
class Family:
    """What the architecture's name alone decides; sizes and switches are ModelConfig's.

    Defaults are those that transformers gives to a key that config.json leaves out.
    """

    architecture: str
    """The name in config.json's `architectures`."""
    gguf_architecture: str
    """`general.architecture` of the family's GGUF files."""
    gguf_interleaved: bool = False
    """llama.cpp stores q and k rows of the family as (2i, 2i + 1) pairs instead of halves."""
    activation: Activation = Activation.SILU
    head_dim_default: int | None = None
    """None: hidden_size / heads."""
    rope_theta_default: float = 10000.0
    tied_by_default: bool = False
    qkv_bias: bool = False
    """q, k and v always have a bias; the output projection never."""
    attention_bias_key: bool = False
    """config.json's `attention_bias` switches biases of all four projections."""
    mlp_bias_key: bool = False
    query_key_norm: bool = False
    """RMS norm over each head of q and k, before the rotation."""
    norm_offset: bool = False
    """Norms multiply by 1 + weight, in float32."""
    output_norms: bool = False
    """Attention's and MLP's outputs are normed too, before they join the residual."""
    scaled_embedding: bool = False
    """Embeddings are multiplied by sqrt(hidden_size)."""


_GEMMA: dict[str, Any] = {
    "activation": Activation.GELU_TANH,
    "head_dim_default": 256,
    "tied_by_default": True,
    "attention_bias_key": True,
    "norm_offset": True,
    "scaled_embedding": True,
}

LLAMA = Family("LlamaForCausalLM", "llama", gguf_interleaved=True, attention_bias_key=True, mlp_bias_key=True)
MISTRAL = Family("MistralForCausalLM", "llama", gguf_interleaved=True)
"""Its GGUF files say llama."""
QWEN2 = Family("Qwen2ForCausalLM", "qwen2", qkv_bias=True)
QWEN3 = Family(
    "Qwen3ForCausalLM", "qwen3", head_dim_default=128, attention_bias_key=True, query_key_norm=True
)
SMOLLM3 = Family(
    "SmolLM3ForCausalLM",
    "smollm3",
    gguf_interleaved=True,
    rope_theta_default=2_000_000.0,
    tied_by_default=True,
    attention_bias_key=True,
    mlp_bias_key=True,
)
GEMMA = Family("GemmaForCausalLM", "gemma", **_GEMMA)
GEMMA2 = Family("Gemma2ForCausalLM", "gemma2", output_norms=True, **_GEMMA)
GEMMA3 = Family(
    "Gemma3ForCausalLM",
    "gemma3",
    output_norms=True,
    query_key_norm=True,
    rope_theta_default=1_000_000.0,
    **_GEMMA,
)

FAMILIES = {
    family.architecture: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3, SMOLLM3, GEMMA, GEMMA2, GEMMA3)
}
"""By the name in config.json."""

GGUF_FAMILIES = {family.gguf_architecture: family for family in FAMILIES.values() if family is not MISTRAL}
"""By `general.architecture`."""

GGUF_TYPES = (
    "F32",
    "F16",
    "BF16",
    "Q8_0",
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q2_K",
    "Q3_K",
    "Q4_K",
    "Q5_K",
    "Q6_K",
)
"""Element types that are read, as ggml names them."""


def known_models() -> str:
    """What an error about an unknown model says."""
    return (
        f"supported are {', '.join(FAMILIES)} and GGUF architectures {', '.join(GGUF_FAMILIES)}, with rope "
        "default, linear, llama3, yarn or (within its context) dynamic, and weights in float32, float16 or "
        f"bfloat16 (GGUF: {', '.join(GGUF_TYPES)})"
    )
