"""A decoder's weights in the form the step wants them: q, k, v in one matrix, gate and up in one."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from pdserve.core.errors import ConfigError
from pdserve.workers.models.config import ModelConfig

ROPE_FACTORS = "rope_freqs.weight"
"""Canonical name of the per-frequency divisors [head_dim / 2] that Llama-3 GGUF files carry."""
_EMBEDDING = "model.embed_tokens.weight"
_HEAD = "lm_head.weight"
_OLD_BUFFER = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
_NAMES_SHOWN = 4


@dataclass(frozen=True, slots=True)
class Linear:
    """weight [out, in], bias [out] or None."""

    weight: torch.Tensor
    bias: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer."""

    input_norm: torch.Tensor
    """[hidden]"""
    qkv: Linear
    """[(heads + 2 kv heads) x head_dim, hidden]: q, then k, then v."""
    output: Linear
    """[hidden, heads x head_dim]"""
    mlp_norm: torch.Tensor
    """[hidden]"""
    gate_up: Linear
    """[2 x intermediate, hidden]: gate, then up."""
    down: Linear
    """[hidden, intermediate]"""


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """All weights, in the compute dtype on the compute device; tied ones are one tensor."""

    embedding: torch.Tensor
    """[vocab, hidden]"""
    layers: tuple[LayerWeights, ...]
    final_norm: torch.Tensor
    """[hidden]"""
    head: torch.Tensor
    """[vocab, hidden]"""
    rope_factors: torch.Tensor | None
    """float32 [head_dim / 2] on the CPU, where the checkpoint carries them."""


def load_weights(
    config: ModelConfig,
    tensors: Iterable[tuple[str, torch.Tensor]],
    source: object,
    dtype: torch.dtype,
    device: torch.device,
) -> DecoderWeights:
    """Copy a checkpoint's tensors into merged matrices, one at a time, so that no second copy exists.

    Raises:
        ConfigError: a tensor is missing, unexpected, there twice, or of another shape than `config` says.
    """
    build = _Builder(config, dtype, device)
    rope_factors: torch.Tensor | None = None
    for name, tensor in tensors:
        if name == ROPE_FACTORS:
            _check_shape(name, tensor, (config.head_dim // 2,), source)
            rope_factors = tensor.to(torch.float32).clone()
            continue
        if _OLD_BUFFER.fullmatch(name) or (name == _HEAD and config.tie_word_embeddings):
            continue
        slot = build.pending.pop(name, None)
        if slot is None:
            raise ConfigError(
                f"{source}: unexpected tensor {name}, a {config.architecture} of {config.num_layers} layers "
                "with these biases has none of that name"
            )
        _check_shape(name, tensor, tuple(slot.shape), source)
        slot.copy_(tensor)
    if build.pending:
        shown = ", ".join(list(build.pending)[:_NAMES_SHOWN])
        more = f" and {len(build.pending) - _NAMES_SHOWN} more" if len(build.pending) > _NAMES_SHOWN else ""
        raise ConfigError(f"{source}: missing {shown}{more}; the file is incomplete or of another model")
    return DecoderWeights(build.embedding, build.layers, build.final_norm, build.head, rope_factors)


def _check_shape(name: str, tensor: torch.Tensor, expected: tuple[int, ...], source: object) -> None:
    if tuple(tensor.shape) != expected:
        raise ConfigError(
            f"{source}: {name} has shape {list(tensor.shape)}, the configuration says {list(expected)}"
        )


class _Builder:
    """Uninitialised weights, and for each tensor still to come the view that takes it."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        self._config = config
        self._dtype = dtype
        self._device = device
        self.pending: dict[str, torch.Tensor] = {}
        self.embedding = self._tensor(_EMBEDDING, config.vocab_size, config.hidden_size)
        self.layers = tuple(self._layer(f"model.layers.{i}") for i in range(config.num_layers))
        self.final_norm = self._tensor("model.norm.weight", config.hidden_size)
        self.head = (
            self.embedding
            if config.tie_word_embeddings
            else self._tensor(_HEAD, config.vocab_size, config.hidden_size)
        )

    def _layer(self, prefix: str) -> LayerWeights:
        config = self._config
        hidden, inner = config.hidden_size, config.intermediate_size
        q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        qkv = {f"{attention}.q_proj": q_rows, f"{attention}.k_proj": kv_rows, f"{attention}.v_proj": kv_rows}
        gate_up = {f"{mlp}.gate_proj": inner, f"{mlp}.up_proj": inner}
        return LayerWeights(
            input_norm=self._tensor(f"{prefix}.input_layernorm.weight", hidden),
            qkv=self._linear(qkv, hidden, config.attention_bias),
            output=self._linear({f"{attention}.o_proj": hidden}, q_rows, config.output_bias),
            mlp_norm=self._tensor(f"{prefix}.post_attention_layernorm.weight", hidden),
            gate_up=self._linear(gate_up, hidden, config.mlp_bias),
            down=self._linear({f"{mlp}.down_proj": hidden}, inner, config.mlp_bias),
        )

    def _tensor(self, name: str, *shape: int) -> torch.Tensor:
        tensor = torch.empty(shape, dtype=self._dtype, device=self._device)
        self.pending[name] = tensor
        return tensor

    def _linear(self, parts: dict[str, int], columns: int, has_bias: bool) -> Linear:
        """One matrix of the parts' rows (name to rows), in order."""
        rows = sum(parts.values())
        weight = torch.empty(rows, columns, dtype=self._dtype, device=self._device)
        bias = torch.empty(rows, dtype=self._dtype, device=self._device) if has_bias else None
        first = 0
        for name, count in parts.items():
            self.pending[f"{name}.weight"] = weight[first : first + count]
            if bias is not None:
                self.pending[f"{name}.bias"] = bias[first : first + count]
            first += count
        return Linear(weight, bias)
