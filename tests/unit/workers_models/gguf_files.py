"""Writes GGUF files as llama.cpp's converter does."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
ONE_NORM = {"post_attention_layernorm": "ffn_norm"}
OUTPUT_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
SUPER_BLOCK = 256
SCALE_OFFSETS = {
    Kind.Q2_K: (80, 82),
    Kind.Q3_K: (108,),
    Kind.Q4_K: (0, 2),
    Kind.Q5_K: (0, 2),
    Kind.Q6_K: (208,),
}
"""Where a block of 256 keeps its float16 scales; every other byte may have any value."""


def stored_as(values: np.ndarray, kind: Kind) -> tuple[np.ndarray, np.ndarray]:
    """Bytes of `kind`, and what the gguf package makes of them.

    The package cannot quantise to K types: there the bytes are random, with scales for values around 0.1.
    """
    if kind not in SCALE_OFFSETS:
        raw = gguf.quants.quantize(values, kind)
        return raw, gguf.quants.dequantize(raw, kind)
    block_bytes = gguf.GGML_QUANT_SIZES[kind][1]
    blocks = np.random.default_rng(values.size).integers(
        0, 256, (values.size // SUPER_BLOCK, block_bytes), dtype=np.uint8
    )

    def scaled(scale: float) -> np.ndarray:
        for offset in SCALE_OFFSETS[kind]:
            blocks[:, offset : offset + 2] = np.array([scale], np.float16).view(np.uint8)
        return gguf.quants.dequantize(blocks.reshape(*values.shape[:-1], -1), kind)

    exact = scaled(0.1 / float(scaled(0.01).std()) * 0.01)
    return blocks.reshape(*values.shape[:-1], -1), exact


def interleaved(weights: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's converter, for q and k of some architectures."""
    return (
        weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
        .swapaxes(1, 2)
        .reshape(weights.shape)
    )


def in_halves(weights: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of `interleaved`."""
    return (
        weights.reshape(heads, weights.shape[0] // heads // 2, 2, *weights.shape[1:])
        .swapaxes(1, 2)
        .reshape(weights.shape)
    )


def write_gguf(
    path: Path,
    model: Any,
    kind: Kind = Kind.F32,
    arch: str = "llama",
    skip: str = "",
    extra: dict[str, np.ndarray] | None = None,
    metadata: dict[str, str | int | float] | None = None,
) -> Path:
    """Write `model` with its matrices in `kind`, and set the model itself to what was written."""
    config = model.config
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}
    for key, value in (metadata or {}).items():
        add[type(value)](key, value)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        theirs = gguf_name(name, arch)
        raw, stored = _converted(name, tensor, kind, arch, config)
        if theirs != skip:
            writer.add_tensor(theirs, raw, raw_dtype=stored)
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_name(name: str, arch: str) -> str:
    for ours, theirs in (NAMES | (OUTPUT_NORMS if arch in ("gemma2", "gemma3") else ONE_NORM)).items():
        name = name.replace(ours, theirs)
    return name


def _converted(
    name: str, tensor: torch.Tensor, kind: Kind, arch: str, config: Any
) -> tuple[np.ndarray, Kind]:
    """The file's bytes and their kind; `tensor` becomes what they stand for."""
    values, stored = tensor.numpy().copy(), Kind.F32 if tensor.ndim == 1 else kind
    heads = 0
    if arch in ("llama", "smollm3"):
        heads = config.num_attention_heads if "q_proj" in name else 0
        heads = config.num_key_value_heads if "k_proj" in name else heads
    offset = 1 if arch.startswith("gemma") and name.endswith("norm.weight") else 0
    raw, exact = stored_as((interleaved(values, heads) if heads else values) + offset, stored)
    tensor.copy_(torch.from_numpy((in_halves(exact, heads) if heads else exact) - offset))
    return raw, stored
