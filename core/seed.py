"""Seeds as pure functions: the same on every machine, in every process, in any order of evaluation."""

from typing import Final

_WORD: Final = (1 << 64) - 1
GOLDEN_GAMMA: Final = 0x9E3779B97F4A7C15
"""Odd increment of the SplitMix64 sequence (2^64 over the golden ratio)."""

MIX_SHIFTS: Final = (30, 27, 31)
MIX_FACTORS: Final = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
"""The finalizer of SplitMix64 (Steele, Lea and Flood, 2014; Stafford's variant 13)."""


def mix64(value: int) -> int:
    """A bijection of 64-bit words in which every output bit depends on every input bit."""
    word = value & _WORD
    word = ((word ^ (word >> MIX_SHIFTS[0])) * MIX_FACTORS[0]) & _WORD
    word = ((word ^ (word >> MIX_SHIFTS[1])) * MIX_FACTORS[1]) & _WORD
    return word ^ (word >> MIX_SHIFTS[2])


def derive_seed(seed: int, choice: int) -> int:
    """Seed of one choice of a request; choice 0 keeps the request's own. Others are in [0, 2^63)."""
    if choice == 0:
        return seed
    return mix64(mix64(seed) + choice * GOLDEN_GAMMA) >> 1


def noise_key(seed: int, position: int) -> int:
    """The 64-bit start of the noise sequence of one token position of one sequence."""
    return mix64(mix64(seed + GOLDEN_GAMMA) + position * GOLDEN_GAMMA)
