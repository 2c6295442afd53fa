"""A tiny random model of every family, made with transformers, in which everything that can matter does."""

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

PLAIN_ROPE = {"rope_type": "default", "rope_theta": 50000.0}
WINDOW = 20
"""Shorter than the prompts, and no multiple of a block."""


@dataclass(frozen=True)
class TinyFamily:
    """How to build one. `fields` differ from the common sizes."""

    config: Any
    model: Any
    fields: dict[str, Any] = field(default_factory=dict)

    def build(self, **changes: Any) -> Any:
        """2 to 4 layers, hidden 64; norms and biases are random, too. The same for the same `changes`."""
        torch.manual_seed(11)
        sizes = {
            "hidden_size": 64,
            "intermediate_size": 112,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "initializer_range": 0.2,
            "bos_token_id": 1,
            "pad_token_id": None,
            "tie_word_embeddings": False,
        }
        return randomised(self.model(self.config(**{**sizes, **self.fields, **changes})))


FAMILIES = {
    "llama": TinyFamily(LlamaConfig, LlamaForCausalLM, {"attention_bias": True, "mlp_bias": True}),
    "mistral": TinyFamily(MistralConfig, MistralForCausalLM, {"sliding_window": None, "head_dim": 24}),
    "mistral-window": TinyFamily(MistralConfig, MistralForCausalLM, {"sliding_window": WINDOW}),
    "qwen2": TinyFamily(Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True}),
    "qwen2-window": TinyFamily(
        Qwen2Config,
        Qwen2ForCausalLM,
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "qwen3": TinyFamily(Qwen3Config, Qwen3ForCausalLM, {"head_dim": 32, "attention_bias": True}),
    "smollm3": TinyFamily(
        SmolLM3Config,
        SmolLM3ForCausalLM,
        {
            "num_hidden_layers": 4,
            "no_rope_layer_interval": 2,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    "gemma": TinyFamily(
        GemmaConfig, GemmaForCausalLM, {"head_dim": 32, "num_key_value_heads": 1, "tie_word_embeddings": True}
    ),
    "gemma2": TinyFamily(
        Gemma2Config,
        Gemma2ForCausalLM,
        {
            "head_dim": 32,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 24,
            # Low enough to bend what so small a model scores.
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 5.0,
            "tie_word_embeddings": True,
        },
    ),
    "gemma3": TinyFamily(
        Gemma3TextConfig,
        Gemma3ForCausalLM,
        {
            "head_dim": 32,
            "num_hidden_layers": 4,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
            "query_pre_attn_scalar": 24,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
            "tie_word_embeddings": True,
        },
    ),
}


def randomised(model: Any) -> Any:
    """Give norms and biases values that matter: transformers initialises them to ones and zeros."""
    middle = 0.0 if type(model).__name__.startswith("Gemma") else 1.0  # Gemma's norms multiply by 1 + weight
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0.0, 0.3)
            elif "norm" in name:
                parameter.normal_(middle, 0.2)
    return model.eval()
