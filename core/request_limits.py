"""What router and worker both hold requests to: the router at the door, the worker for what comes past it."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from pdserve.core.errors import InvalidRequest
from pdserve.core.types import Constraint, SamplingParams, blocks_for, hit_limit

MAX_LOGIT_BIASES: Final = 1024
MAX_STOPS: Final = 64
"""Stop strings, and stop token ids, of one request."""
MAX_STOP_BYTES: Final = 1024
"""UTF-8 bytes of one stop string: the text that may have to be held back."""


@dataclass(frozen=True, slots=True)
class Range:
    """Numbers from `low` to `high`; `low` is one of them unless `above`. NaN is in no range."""

    low: float
    high: float
    above: bool = False

    def __contains__(self, value: float) -> bool:
        return (value > self.low if self.above else value >= self.low) and value <= self.high

    def __str__(self) -> str:
        if math.isinf(self.high):
            return f"at least {self.low:g}"
        return f"{'above' if self.above else 'from'} {self.low:g} to {self.high:g}"


RANGES: Final = (
    ("max_tokens", Range(1, math.inf)),
    ("temperature", Range(0, 100)),
    ("top_p", Range(0, 1, above=True)),
    ("top_k", Range(0, math.inf)),
    ("min_p", Range(0, 1)),
    ("n", Range(1, 128)),
    # Wider would be of no use and could push float32 logits to infinity.
    ("repetition_penalty", Range(0.01, 100)),
    ("presence_penalty", Range(-2, 2)),
    ("frequency_penalty", Range(-2, 2)),
    ("min_tokens", Range(0, math.inf)),
    ("logprobs", Range(0, 20)),
)
"""Fields of SamplingParams that are one number each."""

BIAS_RANGE: Final = Range(-100, 100)
SEED_BITS: Final = 64


def check_sampling(sampling: SamplingParams) -> None:
    """What is wrong whatever the model. Raises InvalidRequest for a value out of its range."""
    for name, allowed in RANGES:
        value = getattr(sampling, name)
        if value is not None and value not in allowed:
            shown = f"{value:g}" if isinstance(value, float) else str(value)
            raise InvalidRequest(f"{name} is {shown}: it must be {allowed}")
    if not 0 <= sampling.seed < 1 << SEED_BITS:
        raise InvalidRequest(f"seed is {sampling.seed}: it must be from 0 to 2^{SEED_BITS} - 1")
    if sampling.min_tokens > sampling.max_tokens:
        raise InvalidRequest(
            f"min_tokens is {sampling.min_tokens}, max_tokens {sampling.max_tokens}: raise max_tokens or "
            "lower min_tokens"
        )
    _check_biases(sampling.logit_bias)
    _check_stops(sampling.stop)
    _check_count("stop_token_ids", len(sampling.stop_token_ids), MAX_STOPS)
    if sampling.constraint is not None:
        _check_constraint(sampling.constraint, sampling)


def check_sampling_tokens(sampling: SamplingParams, vocab_size: int) -> None:
    """What needs the vocabulary. Raises InvalidRequest for a token id that is not in it."""
    _check_ids("logit_bias", (token for token, _ in sampling.logit_bias), vocab_size)
    _check_ids("stop_token_ids", sampling.stop_token_ids, vocab_size)
    banned = {token for token, bias in sampling.logit_bias if bias == BIAS_RANGE.low}
    if len(banned) >= vocab_size:
        raise InvalidRequest(f"logit_bias bans all {vocab_size} tokens of the vocabulary: leave at least one")


def _check_biases(biases: Sequence[tuple[int, float]]) -> None:
    _check_count("logit_bias", len(biases), MAX_LOGIT_BIASES)
    for token, bias in biases:
        if bias not in BIAS_RANGE:
            raise InvalidRequest(f"logit_bias of token {token} is {bias:g}: it must be {BIAS_RANGE}")


def _check_stops(stops: Sequence[str]) -> None:
    _check_count("stop", len(stops), MAX_STOPS)
    for number, stop in enumerate(stops):
        if not stop:
            raise InvalidRequest(f"stop[{number}] is empty: leave it out or give a text")
        size = len(stop.encode(errors="surrogatepass"))
        if size > MAX_STOP_BYTES:
            raise InvalidRequest(
                f"stop[{number}] has {size} bytes, the limit is {MAX_STOP_BYTES}: give a shorter text"
            )


def _check_constraint(constraint: Constraint, sampling: SamplingParams) -> None:
    """Contradictions; size and whether it compiles: core/constraint_check.py."""
    for name, asked in (("ignore_eos", sampling.ignore_eos), ("min_tokens", sampling.min_tokens > 0)):
        if asked:
            raise InvalidRequest(
                f"{name} forbids the end that a {constraint.kind} constraint may leave as the only choice: "
                f"leave out {name} or the constraint"
            )


def _check_count(name: str, count: int, most: int) -> None:
    if count > most:
        raise InvalidRequest(f"{name} has {count} entries, the limit is {most}: send fewer")


def _check_ids(name: str, ids: Iterable[int], vocab_size: int) -> None:
    for token in ids:
        if not 0 <= token < vocab_size:
            raise InvalidRequest(
                f"{name} has token id {token}, out of the vocabulary: ids go from 0 to {vocab_size - 1}"
            )


def check_tokens(tokens: Sequence[int], vocab_size: int) -> None:
    """Raises InvalidRequest for no tokens, or one outside the vocabulary."""
    if not tokens:
        raise InvalidRequest("the prompt has no tokens: send a longer one")
    highest = max(tokens)
    if min(tokens) < 0 or highest >= vocab_size:
        wrong = highest if highest >= vocab_size else min(tokens)
        raise InvalidRequest(f"token id {wrong} is out of the vocabulary: ids go from 0 to {vocab_size - 1}")


def promise_blocks(prompt_tokens: int, max_tokens: int, headroom_tokens: int, choices: int = 1) -> int:
    """Blocks that a decode worker promises: the prompt, and each choice's completion up to the headroom.

    The prompt's full blocks before its last position are shared by all choices; the block of that position
    and all later ones are each choice's own. The last token of a completion needs no room: nothing is
    computed behind it.
    """
    shared = hit_limit(prompt_tokens)
    own = blocks_for(prompt_tokens + min(max_tokens - 1, headroom_tokens)) - shared
    return shared + choices * own
