"""The model's forward pass over one engine step."""

from pathlib import Path

import torch
import torch.nn.functional as F

from pdserve.core.errors import ConfigError, InternalError
from pdserve.workers.attention.base import Attention
from pdserve.workers.attention.batch import StepBatch
from pdserve.workers.attention.torch_paged import TorchPagedAttention
from pdserve.workers.models.checkpoint import open_checkpoint
from pdserve.workers.models.config import ModelConfig
from pdserve.workers.models.rope import Rotation, inverse_frequencies, rotation
from pdserve.workers.models.weights import DecoderWeights, LayerWeights, Linear, load_weights

_DTYPES = (torch.float32, torch.bfloat16)


class Decoder:
    """A llama-like decoder over paged KV. Owns its weights; the KV belongs to the caller's pool.

    In float32 the logits are those of transformers to about 1e-5; in bfloat16 values are rounded at the
    same places (after each matrix product, norm, rope and residual sum).
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: DecoderWeights,
        attention: Attention | None = None,
    ) -> None:
        self.config = config
        self.dtype = weights.embedding.dtype
        self.device = weights.embedding.device
        self._weights = weights
        self._attention = TorchPagedAttention() if attention is None else attention
        self._inv_freq = inverse_frequencies(config, weights.rope_factors).to(self.device)

    @classmethod
    def load(
        cls,
        path: Path,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        attention: Attention | None = None,
    ) -> "Decoder":
        """Load a folder with config.json and safetensors, or a `.gguf` file.

        Raises:
            ConfigError: unsupported model or dtype, or files that are missing, truncated or of another model.
        """
        if dtype not in _DTYPES:
            raise ConfigError(f"compute dtype {dtype} is not supported; supported are float32 and bfloat16")
        checkpoint = open_checkpoint(path)
        weights = load_weights(checkpoint.config, checkpoint.tensors(), path, dtype, torch.device(device))
        return cls(checkpoint.config, weights, attention)

    @torch.no_grad()
    def forward(self, batch: StepBatch, kv: torch.Tensor) -> torch.Tensor:
        """Run one step: write the K and V of its tokens into `kv`, return the logits that it asks for.

        `kv` is the pool, `config.kv_shape(blocks)` in the compute dtype, contiguous, on the decoder's device.
        Returns float32 [R, vocab], rows in the order of `batch.logit_rows`; R may be 0.

        Raises:
            InternalError: `kv` is not of that form.
        """
        self._check_kv(kv)
        turn = rotation(batch.positions, self._inv_freq, self.dtype)
        hidden = F.embedding(batch.token_ids, self._weights.embedding)
        for number, layer in enumerate(self._weights.layers):
            normed = self._norm(hidden, layer.input_norm)
            hidden = hidden + self._attend(normed, layer, kv[:, number], batch, turn)
            hidden = hidden + self._mlp(self._norm(hidden, layer.mlp_norm), layer)
        last = self._norm(hidden[batch.logit_rows], self._weights.final_norm)
        return F.linear(last, self._weights.head).to(torch.float32)

    def _attend(
        self,
        normed: torch.Tensor,
        layer: LayerWeights,
        kv_layer: torch.Tensor,
        batch: StepBatch,
        turn: Rotation,
    ) -> torch.Tensor:
        config = self.config
        tokens = normed.shape[0]
        heads = _linear(normed, layer.qkv).view(tokens, -1, config.head_dim)
        rotated = turn.apply(heads[:, : config.num_heads + config.num_kv_heads])
        v = heads[:, config.num_heads + config.num_kv_heads :]
        self._attention.write(kv_layer, rotated[:, config.num_heads :], v, batch)
        attended = self._attention.attend(rotated[:, : config.num_heads], kv_layer, batch)
        return _linear(attended.reshape(tokens, -1), layer.output)

    def _mlp(self, normed: torch.Tensor, layer: LayerWeights) -> torch.Tensor:
        gate, up = _linear(normed, layer.gate_up).chunk(2, dim=-1)
        return _linear(F.silu(gate) * up, layer.down)

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """RMS norm: statistics in float32, the weight applied in the compute dtype."""
        wide = x.to(torch.float32)
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.config.rms_norm_eps)
        return weight * (wide * scale).to(self.dtype)

    def _check_kv(self, kv: torch.Tensor) -> None:
        expected = self.config.kv_shape(kv.shape[0])
        if tuple(kv.shape) != expected or kv.dtype != self.dtype or not kv.is_contiguous():
            raise InternalError(
                f"KV is {kv.dtype} {list(kv.shape)}{'' if kv.is_contiguous() else ', not contiguous'}; this "
                f"model needs contiguous {self.dtype} {list(expected)}"
            )


def _linear(x: torch.Tensor, linear: Linear) -> torch.Tensor:
    return F.linear(x, linear.weight, linear.bias)
