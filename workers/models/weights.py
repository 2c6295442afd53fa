"""A decoder's weights in the form the step wants them: q, k, v in one matrix, gate and up in one."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

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
    query_key_norm: torch.Tensor | None
    """[heads + kv heads, head_dim]: the query norm's weight for each head of q, then the key norm's."""
    attention_output_norm: torch.Tensor | None
    """[hidden]"""
    mlp_norm: torch.Tensor
    """[hidden]"""
    gate_up: Linear
    """[2 x intermediate, hidden]: gate, then up."""
    down: Linear
    """[hidden, intermediate]"""
    mlp_output_norm: torch.Tensor | None
    """[hidden]"""


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """All weights, in the compute dtype on the compute device; tied ones are one tensor.

    Norm weights of families with `norm_offset` are 1 + weight, in float32.
    """

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
            rope_factors = tensor.to(torch.float32).clone()
        slot = build.take(name, tuple(tensor.shape), source)
        if slot is not None:
            slot.copy_(tensor)
            if config.family.norm_offset and name.endswith("norm.weight"):
                slot.add_(1.0)
    build.require_complete(source)
    return DecoderWeights(build.embedding, build.layers, build.final_norm, build.head, rope_factors)


def check_tensors(config: ModelConfig, shapes: Iterable[tuple[str, tuple[int, ...]]], source: object) -> None:
    """Raise what `load_weights` would for tensors of these names and shapes; none is read or held."""
    build = _Builder(config, torch.float32, torch.device("meta"))
    for name, shape in shapes:
        build.take(name, shape, source)
    build.require_complete(source)


class _Slot(NamedTuple):
    """Where a tensor still to come goes: `view` may repeat its `shape` in front."""

    view: torch.Tensor
    shape: tuple[int, ...]


class _Builder:
    """Uninitialised weights, and for each tensor still to come the view that takes it."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        self._config = config
        self._dtype = dtype
        self._device = device
        self._pending: dict[str, _Slot] = {}
        self.embedding = self._tensor(_EMBEDDING, config.vocab_size, config.hidden_size)
        self.layers = tuple(self._layer(f"model.layers.{i}") for i in range(config.num_layers))
        self.final_norm = self._norm("model.norm")
        self.head = (
            self.embedding
            if config.tie_word_embeddings
            else self._tensor(_HEAD, config.vocab_size, config.hidden_size)
        )

    def take(self, name: str, shape: tuple[int, ...], source: object) -> torch.Tensor | None:
        """The view for a tensor that has come; None for one that this decoder has no use for."""
        config = self._config
        if name == ROPE_FACTORS:
            _check_shape(name, shape, (config.head_dim // 2,), source)
            return None
        if _OLD_BUFFER.fullmatch(name) or (name == _HEAD and config.tie_word_embeddings):
            return None
        slot = self._pending.pop(name, None)
        if slot is None:
            raise ConfigError(
                f"{source}: unexpected tensor {name}, a {config.architecture} of {config.num_layers} layers "
                "with these biases has none of that name; config.json and weights are of two models, or "
                "the tensor is there twice"
            )
        _check_shape(name, shape, slot.shape, source)
        return slot.view

    def require_complete(self, source: object) -> None:
        if not self._pending:
            return
        shown = ", ".join(list(self._pending)[:_NAMES_SHOWN])
        more = f" and {len(self._pending) - _NAMES_SHOWN} more" if len(self._pending) > _NAMES_SHOWN else ""
        raise ConfigError(
            f"{source}: missing {shown}{more}; the file is incomplete or of another model: download it again"
        )

    def _layer(self, prefix: str) -> LayerWeights:
        config, family = self._config, self._config.family
        hidden, inner = config.hidden_size, config.intermediate_size
        q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        qkv = {f"{attention}.q_proj": q_rows, f"{attention}.k_proj": kv_rows, f"{attention}.v_proj": kv_rows}
        gate_up = {f"{mlp}.gate_proj": inner, f"{mlp}.up_proj": inner}
        outputs = family.output_norms
        # The name of the MLP's own norm says something else where the attention's output has a norm, too.
        before_mlp = "pre_feedforward_layernorm" if outputs else "post_attention_layernorm"
        return LayerWeights(
            input_norm=self._norm(f"{prefix}.input_layernorm"),
            qkv=self._linear(qkv, hidden, config.attention_bias),
            output=self._linear({f"{attention}.o_proj": hidden}, q_rows, config.output_bias),
            query_key_norm=self._query_key_norm(attention) if family.query_key_norm else None,
            attention_output_norm=self._norm(f"{prefix}.post_attention_layernorm") if outputs else None,
            mlp_norm=self._norm(f"{prefix}.{before_mlp}"),
            gate_up=self._linear(gate_up, hidden, config.mlp_bias),
            down=self._linear({f"{mlp}.down_proj": hidden}, inner, config.mlp_bias),
            mlp_output_norm=self._norm(f"{prefix}.post_feedforward_layernorm") if outputs else None,
        )

    def _tensor(self, name: str, *shape: int) -> torch.Tensor:
        tensor = torch.empty(shape, dtype=self._dtype, device=self._device)
        self._pending[name] = _Slot(tensor, shape)
        return tensor

    def _norm_weights(self, *shape: int) -> torch.Tensor:
        dtype = torch.float32 if self._config.family.norm_offset else self._dtype
        return torch.empty(shape, dtype=dtype, device=self._device)

    def _norm(self, name: str) -> torch.Tensor:
        weight = self._norm_weights(self._config.hidden_size)
        self._pending[f"{name}.weight"] = _Slot(weight, tuple(weight.shape))
        return weight

    def _query_key_norm(self, attention: str) -> torch.Tensor:
        config = self._config
        weight = self._norm_weights(config.num_heads + config.num_kv_heads, config.head_dim)
        one_head = (config.head_dim,)
        self._pending[f"{attention}.q_norm.weight"] = _Slot(weight[: config.num_heads], one_head)
        self._pending[f"{attention}.k_norm.weight"] = _Slot(weight[config.num_heads :], one_head)
        return weight

    def _linear(self, parts: dict[str, int], columns: int, has_bias: bool) -> Linear:
        """One matrix of the parts' rows (name to rows), in order."""
        rows = sum(parts.values())
        weight = torch.empty(rows, columns, dtype=self._dtype, device=self._device)
        bias = torch.empty(rows, dtype=self._dtype, device=self._device) if has_bias else None
        first = 0
        for name, count in parts.items():
            self._pending[f"{name}.weight"] = _Slot(weight[first : first + count], (count, columns))
            if bias is not None:
                self._pending[f"{name}.bias"] = _Slot(bias[first : first + count], (count,))
            first += count
        return Linear(weight, bias)


def _check_shape(name: str, found: tuple[int, ...], expected: tuple[int, ...], source: object) -> None:
    if found != expected:
        raise ConfigError(
            f"{source}: {name} has shape {list(found)}, the configuration says {list(expected)}; "
            "configuration and weights are of two models: download both again"
        )
