"""Rotary position embedding, rounded as transformers rounds it."""

import math

import torch

from pdserve.workers.models.config import Llama3RopeScaling, ModelConfig


def inverse_frequencies(config: ModelConfig, factors: torch.Tensor | None = None) -> torch.Tensor:
    """float32 [head_dim / 2] on the CPU: theta ** (-2i / head_dim), scaled as the model was trained.

    `factors` [head_dim / 2] divide the frequencies (GGUF's `rope_freqs.weight`).
    """
    # In float32 throughout: the oracle's last bits, which float64 would not give.
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).to(torch.float32) / config.head_dim
    inv_freq = 1.0 / (config.rope_theta**exponents)
    if config.rope_scaling is not None:
        inv_freq = _llama3(inv_freq, config.rope_scaling)
    return inv_freq if factors is None else inv_freq / factors.to("cpu", torch.float32)


def _llama3(inv_freq: torch.Tensor, scaling: Llama3RopeScaling) -> torch.Tensor:
    wavelength = 2 * math.pi / inv_freq
    trained = scaling.original_max_position_embeddings
    longest_kept = trained / scaling.high_freq_factor
    shortest_divided = trained / scaling.low_freq_factor
    span = scaling.high_freq_factor - scaling.low_freq_factor
    keep = (trained / wavelength - scaling.low_freq_factor) / span
    divided = inv_freq / scaling.factor
    blended = (1 - keep) * divided + keep * inv_freq
    scaled = torch.where(wavelength > shortest_divided, divided, inv_freq)
    between = (wavelength >= longest_kept) & (wavelength <= shortest_divided)
    return torch.where(between, blended, scaled)


def rotation(positions: torch.Tensor, inv_freq: torch.Tensor, dtype: torch.dtype) -> "Rotation":
    """The step's rotation for int64 positions [T]: angles in float32, cos and sin in `dtype`."""
    angles = positions.to(torch.float32)[:, None] * inv_freq
    full = torch.cat((angles, angles), dim=-1)[:, None, :]
    return Rotation(full.cos().to(dtype), full.sin().to(dtype))


class Rotation:
    """cos and sin [T, 1, head_dim], applied by every layer of a step."""

    def __init__(self, cos: torch.Tensor, sin: torch.Tensor) -> None:
        self._cos = cos
        self._sin = sin

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """Rotate x [T, heads, head_dim]: value i turns with value i + head_dim / 2 (neox halves)."""
        first, second = x.chunk(2, dim=-1)
        return x * self._cos + torch.cat((-second, first), dim=-1) * self._sin
