"""Configuration and weights from a GGUF file (llama.cpp's format; architectures llama and qwen2)."""

import math
from collections.abc import Iterator
from pathlib import Path

import gguf
import gguf.quants
import numpy as np
import numpy.typing as npt
import torch

from pdserve.core.errors import ConfigError
from pdserve.core.gguf_header import GgufHeader, GgufTensor
from pdserve.workers.models.config import ModelConfig, unsupported
from pdserve.workers.models.gguf_config import config_from_gguf

_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1")
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
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class GgufCheckpoint:
    """One unsplit GGUF file. Weights are dequantised to float32 as they are read."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._header = GgufHeader.read(file)
        self.config: ModelConfig = config_from_gguf(self._header)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        content = np.memmap(self._file, np.uint8, "r")
        for tensor in self._header.tensors:
            kind = self._kind(tensor)
            # Shapes are innermost first in the file, and rows are whole numbers of quantisation blocks.
            shape = gguf.quant_shape_to_byte_shape(tensor.shape[::-1], kind)
            end = tensor.offset + math.prod(shape)
            if end > content.size:
                raise ConfigError(
                    f"cannot read {self._file}, truncated or not GGUF: {tensor.name} ends at byte {end} of "
                    f"{content.size}"
                )
            values = gguf.quants.dequantize(content[tensor.offset : end].reshape(shape), kind)
            name = canonical_name(tensor.name)
            yield name, torch.from_numpy(np.require(self._in_halves(name, values), requirements=["C", "W"]))

    def _kind(self, tensor: GgufTensor) -> gguf.GGMLQuantizationType:
        try:
            kind = gguf.GGMLQuantizationType(tensor.type_number)
        except ValueError:
            raise unsupported(self._file, f"type number {tensor.type_number} of {tensor.name}") from None
        if kind.name not in _TYPES:
            raise unsupported(self._file, f"type {kind.name} of {tensor.name}")
        return kind

    def _in_halves(self, name: str, values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Undo llama.cpp's interleaving of q and k rows: (2i, 2i + 1) pairs become halves, per head."""
        if self.config.architecture != "LlamaForCausalLM":
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


def canonical_name(name: str) -> str:
    """Hugging Face's name of a GGUF tensor; a name that is unknown stays as it is."""
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in _LAYER_NAMES:
        return f"model.layers.{parts[1]}.{_LAYER_NAMES[parts[2]]}.{parts[3]}"
    if len(parts) == 2 and parts[0] in _TOP_NAMES:
        return f"{_TOP_NAMES[parts[0]]}.{parts[1]}"
    return name
