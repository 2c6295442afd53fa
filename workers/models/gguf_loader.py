"""Configuration and weights from a GGUF file (llama.cpp's format)."""

import math
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path

import gguf
import gguf.quants
import numpy as np
import numpy.typing as npt
import torch

from pdserve.core.errors import ConfigError
from pdserve.core.gguf_header import GgufHeader, GgufTensor
from pdserve.workers.models.config import ModelConfig, unsupported
from pdserve.workers.models.families import GGUF_TYPES
from pdserve.workers.models.gguf_config import config_from_gguf
from pdserve.workers.models.stored_tensor import StoredTensor

_SLAB_BYTES = 4 << 20
"""Quantised bytes that are dequantised at once."""
_TOP_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "rope_freqs": "rope_freqs",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTPUT_NORM_NAMES = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
"""Instead or in addition, in families with norms of outputs."""


class GgufCheckpoint:
    """One unsplit GGUF file. Weights are dequantised to float32 as they are read."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._header = GgufHeader.read(file)
        self.config: ModelConfig = config_from_gguf(self._header)
        self.files = (file,)

    def stored(self) -> Iterator[StoredTensor]:
        size = self._file.stat().st_size
        self._refuse_overlaps()
        for tensor in self._header.tensors:
            kind = self._kind(tensor)
            num_bytes = math.prod(self._byte_shape(tensor, kind))
            end = tensor.offset + num_bytes
            if end > size:
                raise ConfigError(
                    f"cannot read {self._file}, truncated or not GGUF: {tensor.name} ends at byte {end} of "
                    f"{size}; download the file again"
                )
            yield StoredTensor(self._name(tensor.name), tensor.shape[::-1], kind.name, num_bytes)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        content = np.memmap(self._file, np.uint8, "r")
        for tensor, stored in zip(self._header.tensors, self.stored(), strict=True):
            kind = self._kind(tensor)
            raw = content[tensor.offset : tensor.offset + stored.num_bytes]
            values = dequantized(raw.reshape(self._byte_shape(tensor, kind)), kind, stored.shape)
            if self.config.family.norm_offset and stored.name.endswith("norm.weight"):
                values = values - 1  # llama.cpp keeps 1 + weight
            values = self._in_halves(stored.name, values)
            yield stored.name, torch.from_numpy(np.require(values, requirements=["C", "W"]))

    def _refuse_overlaps(self) -> None:
        spans = sorted(
            (tensor.offset, math.prod(self._byte_shape(tensor, self._kind(tensor))), tensor.name)
            for tensor in self._header.tensors
        )
        for (offset, num_bytes, name), (following, _, other) in pairwise(spans):
            if offset + num_bytes > following:
                raise ConfigError(
                    f"{self._file} is damaged: {name} ends at byte {offset + num_bytes}, after {other} "
                    f"begins at {following}; download the file again"
                )

    def _kind(self, tensor: GgufTensor) -> gguf.GGMLQuantizationType:
        try:
            kind = gguf.GGMLQuantizationType(tensor.type_number)
        except ValueError:
            raise unsupported(self._file, f"type number {tensor.type_number} of {tensor.name}") from None
        if kind.name not in GGUF_TYPES:
            raise unsupported(self._file, f"type {kind.name} of {tensor.name}")
        return kind

    def _byte_shape(self, tensor: GgufTensor, kind: gguf.GGMLQuantizationType) -> tuple[int, ...]:
        """Shapes are innermost first in the file, and rows are whole numbers of quantisation blocks."""
        try:
            return tuple(gguf.quant_shape_to_byte_shape(tensor.shape[::-1], kind))
        except ValueError as error:
            raise ConfigError(
                f"{self._file} is damaged: {tensor.name} of type {kind.name} has rows that are not whole "
                f"blocks ({error}); download the file again"
            ) from error

    def _name(self, name: str) -> str:
        names = _LAYER_NAMES | (_OUTPUT_NORM_NAMES if self.config.family.output_norms else {})
        return canonical_name(name, names)

    def _in_halves(self, name: str, values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Undo llama.cpp's interleaving of q and k rows: (2i, 2i + 1) pairs become halves, per head."""
        if not self.config.family.gguf_interleaved:
            return values
        if ".q_proj." in name:
            heads = self.config.num_heads
        elif ".k_proj." in name:
            heads = self.config.num_kv_heads
        else:
            return values
        if values.shape[0] != heads * self.config.head_dim:
            raise ConfigError(
                f"{self._file}: {name} has {values.shape[0]} rows, must have {heads * self.config.head_dim}"
            )
        pairs = values.reshape(heads, self.config.head_dim // 2, 2, *values.shape[1:])
        return pairs.swapaxes(1, 2).reshape(values.shape)


def canonical_name(name: str, layer_names: Mapping[str, str]) -> str:
    """Hugging Face's name of a GGUF tensor; a name that is unknown stays as it is."""
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in layer_names:
        return f"model.layers.{parts[1]}.{layer_names[parts[2]]}.{parts[3]}"
    if len(parts) == 2 and parts[0] in _TOP_NAMES:
        return f"{_TOP_NAMES[parts[0]]}.{parts[1]}"
    return name


def dequantized(
    raw: npt.NDArray[np.uint8], kind: gguf.GGMLQuantizationType, shape: tuple[int, ...]
) -> npt.NDArray[np.float32]:
    """float32 of `shape` from bytes [.., bytes of a row].

    In slabs of rows: the package's own intermediates are some times as large as its result.
    """
    if len(shape) < 2 or raw.size <= _SLAB_BYTES:
        whole: npt.NDArray[np.float32] = gguf.quants.dequantize(raw, kind)
        return whole
    values = np.empty(shape, np.float32)
    rows = max(1, _SLAB_BYTES // math.prod(raw.shape[1:]))
    for first in range(0, shape[0], rows):
        values[first : first + rows] = gguf.quants.dequantize(raw[first : first + rows], kind)
    return values
