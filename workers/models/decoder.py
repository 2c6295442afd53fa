"""The model's forward pass over one engine step."""

from pathlib import Path

import torch
import torch.nn.functional as F

from pdserve.core.errors import ConfigError, InternalError
from pdserve.workers.attention.base import Attention, AttentionRule
from pdserve.workers.attention.batch import StepBatch
from pdserve.workers.attention.torch_paged import TorchPagedAttention
from pdserve.workers.models.checkpoint import open_checkpoint
from pdserve.workers.models.config import ModelConfig
from pdserve.workers.models.families import Activation
from pdserve.workers.models.rope import Rotation, attention_factor, inverse_frequencies, rotation
from pdserve.workers.models.weights import DecoderWeights, LayerWeights, Linear, check_tensors, load_weights

_DTYPES = (torch.float32, torch.bfloat16)


class Decoder:
    """A decoder of any known family over paged KV. Owns its weights; the KV belongs to the caller's pool.

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
        self.layers_run = 0
        """Layers of all steps so far; any thread may read it while a step runs."""
        self._inv_freq = {
            rope: inverse_frequencies(rope, config.head_dim, weights.rope_factors).to(self.device)
            for rope in {layer.rope for layer in config.layers if layer.rope is not None}
        }
        self._rules = tuple(
            AttentionRule(config.attention_scale, layer.window, config.attention_soft_cap)
            for layer in config.layers
        )
        self._embedding_scale = (
            torch.tensor(config.hidden_size**0.5, dtype=self.dtype, device=self.device)
            if config.family.scaled_embedding
            else None
        )

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
        shapes = ((tensor.name, tensor.shape) for tensor in checkpoint.stored())
        # Headers first: what is wrong is found before gigabytes were read.
        check_tensors(checkpoint.config, shapes, path)
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
        turns = {
            rope: rotation(batch.positions, inv_freq, self.dtype, attention_factor(rope))
            for rope, inv_freq in self._inv_freq.items()
        }
        hidden = F.embedding(batch.token_ids, self._weights.embedding)
        if self._embedding_scale is not None:
            hidden = hidden * self._embedding_scale
        for number, (kind, layer) in enumerate(zip(self.config.layers, self._weights.layers, strict=True)):
            normed = self._norm(hidden, layer.input_norm)
            turn = None if kind.rope is None else turns[kind.rope]
            attended = self._attend(normed, layer, kv[:, number], batch, turn, self._rules[number])
            hidden = hidden + self._maybe_norm(attended, layer.attention_output_norm)
            mixed = self._mlp(self._norm(hidden, layer.mlp_norm), layer)
            hidden = hidden + self._maybe_norm(mixed, layer.mlp_output_norm)
            self.layers_run += 1
        last = self._norm(hidden[batch.logit_rows], self._weights.final_norm)
        logits = F.linear(last, self._weights.head)
        cap = self.config.final_soft_cap
        if cap is not None:
            logits = torch.tanh(logits / cap) * cap
        return logits.to(torch.float32)

    def _attend(
        self,
        normed: torch.Tensor,
        layer: LayerWeights,
        kv_layer: torch.Tensor,
        batch: StepBatch,
        turn: Rotation | None,
        rule: AttentionRule,
    ) -> torch.Tensor:
        config = self.config
        tokens = normed.shape[0]
        heads = _linear(normed, layer.qkv).view(tokens, -1, config.head_dim)
        # q and k go through norm and rotation as one tensor: half the calls.
        q_and_k, v = heads.tensor_split((config.num_heads + config.num_kv_heads,), dim=1)
        q_and_k = self._maybe_norm(q_and_k, layer.query_key_norm)
        if turn is not None:
            q_and_k = turn.apply(q_and_k)
        self._attention.write(kv_layer, q_and_k[:, config.num_heads :], v, batch)
        attended = self._attention.attend(q_and_k[:, : config.num_heads], kv_layer, batch, rule)
        return _linear(attended.reshape(tokens, -1), layer.output)

    def _mlp(self, normed: torch.Tensor, layer: LayerWeights) -> torch.Tensor:
        gate, up = _linear(normed, layer.gate_up).chunk(2, dim=-1)
        if self.config.family.activation is Activation.SILU:
            gate = F.silu(gate)
        else:
            gate = F.gelu(gate, approximate="tanh")
        return _linear(gate * up, layer.down)

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """RMS norm over the last dimension: statistics in float32, the weight applied in its own dtype.

        Weights are in the compute dtype; in families with `norm_offset` they are 1 + weight in float32.
        """
        wide = x.to(torch.float32)
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.config.rms_norm_eps)
        return (weight * normed.to(weight.dtype)).to(self.dtype)

    def _maybe_norm(self, x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        return x if weight is None else self._norm(x, weight)

    def _check_kv(self, kv: torch.Tensor) -> None:
        expected = self.config.kv_shape(kv.shape[0])
        if tuple(kv.shape) != expected or kv.dtype != self.dtype or not kv.is_contiguous():
            raise InternalError(
                f"KV is {kv.dtype} {list(kv.shape)}{'' if kv.is_contiguous() else ', not contiguous'}; this "
                f"model needs contiguous {self.dtype} {list(expected)}"
            )


def _linear(x: torch.Tensor, linear: Linear) -> torch.Tensor:
    return F.linear(x, linear.weight, linear.bias)
