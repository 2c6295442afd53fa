"""Rotary position embedding, rounded as transformers rounds it."""

import math

import torch

from pdserve.workers.models.rope_scaling import LinearScaling, Llama3Scaling, Rope, YarnScaling


def inverse_frequencies(rope: Rope, head_dim: int, factors: torch.Tensor | None = None) -> torch.Tensor:
    """float32 [head_dim / 2] on the CPU: theta ** (-2i / head_dim), scaled as the model was trained.

    `factors` [head_dim / 2] divide the frequencies (GGUF's `rope_freqs.weight`).
    """
    # In float32 throughout: the oracle's last bits, which float64 would not give.
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).to(torch.float32) / head_dim
    wavelengths = rope.theta**exponents
    inv_freq = 1.0 / wavelengths
    match rope.scaling:
        case LinearScaling(factor=factor):
            inv_freq = inv_freq / factor
        case Llama3Scaling() as scaling:
            inv_freq = _llama3(inv_freq, scaling)
        case YarnScaling() as scaling:
            inv_freq = _yarn(wavelengths, rope.theta, scaling)
    return inv_freq if factors is None else inv_freq / factors.to("cpu", torch.float32)


def attention_factor(rope: Rope) -> float:
    """What cos and sin are multiplied by."""
    return rope.scaling.attention_factor if isinstance(rope.scaling, YarnScaling) else 1.0


def _llama3(inv_freq: torch.Tensor, scaling: Llama3Scaling) -> torch.Tensor:
    wavelength = 2 * math.pi / inv_freq
    trained = scaling.original_context
    longest_kept = trained / scaling.high_freq_factor
    shortest_divided = trained / scaling.low_freq_factor
    span = scaling.high_freq_factor - scaling.low_freq_factor
    keep = (trained / wavelength - scaling.low_freq_factor) / span
    divided = inv_freq / scaling.factor
    blended = (1 - keep) * divided + keep * inv_freq
    scaled = torch.where(wavelength > shortest_divided, divided, inv_freq)
    between = (wavelength >= longest_kept) & (wavelength <= shortest_divided)
    return torch.where(between, blended, scaled)


def _yarn(wavelengths: torch.Tensor, theta: float, scaling: YarnScaling) -> torch.Tensor:
    dims = 2 * len(wavelengths)

    def dimension_of(turns: float) -> float:
        """The (fractional) dimension that makes so many turns within the original context."""
        per_turn = scaling.original_context / (turns * 2 * math.pi)
        return dims * math.log(per_turn) / (2 * math.log(theta))

    first, last = dimension_of(scaling.beta_fast), dimension_of(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dims - 1)
    if first == last:
        last += 0.001  # a step, not a division by zero
    ramp = (torch.arange(len(wavelengths), dtype=torch.float32) - first) / (last - first)
    kept = 1 - ramp.clamp(0, 1)
    return 1.0 / (scaling.factor * wavelengths) * (1 - kept) + 1.0 / wavelengths * kept


def rotation(
    positions: torch.Tensor, inv_freq: torch.Tensor, dtype: torch.dtype, factor: float = 1.0
) -> "Rotation":
    """The rotation for int64 positions [T]: angles in float32, cos and sin, times `factor`, in `dtype`."""
    angles = positions.to(torch.float32)[:, None] * inv_freq
    full = torch.cat((angles, angles), dim=-1)[:, None, :]
    return Rotation((full.cos() * factor).to(dtype), (full.sin() * factor).to(dtype))


class Rotation:
    """cos and sin [T, 1, head_dim], applied by every layer of a step that has this rope."""

    def __init__(self, cos: torch.Tensor, sin: torch.Tensor) -> None:
        self._cos = cos
        self._sin = sin

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """Rotate x [T, heads, head_dim]: value i turns with value i + head_dim / 2 (neox halves)."""
        first, second = x.chunk(2, dim=-1)
        return x * self._cos + torch.cat((-second, first), dim=-1) * self._sin
