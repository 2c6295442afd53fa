"""How rotary positions were stretched in training. Pure values; workers/models/rope.py computes with them.

All raise ConfigError for numbers that make no finite frequency.
"""

import math
from dataclasses import dataclass

from pdserve.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """Every frequency is divided by `factor`."""

    factor: float

    def __post_init__(self) -> None:
        _require_above("factor", self.factor, 0)


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Llama 3.1's stretching of the low rotary frequencies.

    Wavelengths above `original_context / low_freq_factor` are divided by `factor`, those below
    `original_context / high_freq_factor` are kept, those between are blended.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int

    def __post_init__(self) -> None:
        _require_above("factor", self.factor, 0)
        _require_above("low_freq_factor", self.low_freq_factor, 0)
        _require_above("high_freq_factor", self.high_freq_factor, self.low_freq_factor)


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """YaRN (arXiv 2309.00071): frequencies that turn less than `beta_slow` times in `original_context` are
    divided by `factor`, those that turn more than `beta_fast` times are kept, with a ramp between.
    """

    factor: float
    original_context: int
    attention_factor: float
    """cos and sin are multiplied by it."""
    beta_fast: float
    beta_slow: float
    truncate: bool
    """The ramp's ends are whole dimensions."""

    def __post_init__(self) -> None:
        for name in ("factor", "attention_factor", "beta_fast", "beta_slow"):
            _require_above(name, getattr(self, name), 0)


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary positions of some layers: theta ** (-2i / head_dim), scaled."""

    theta: float
    scaling: LinearScaling | Llama3Scaling | YarnScaling | None = None

    def __post_init__(self) -> None:
        _require_above("theta", self.theta, 1)


def _require_above(name: str, value: float, low: float) -> None:
    if not low < value < math.inf:
        raise ConfigError(f"the model's rope has {name} {value:g}, must be above {low:g} and finite")
