"""What router and worker both hold requests to: the router at the door, the worker for what comes past it."""

import math
from collections.abc import Sequence

from pdserve.core.errors import InvalidRequest
from pdserve.core.types import SamplingParams, blocks_for


def check_sampling(sampling: SamplingParams) -> None:
    """Raises InvalidRequest for a value out of its range."""
    if sampling.max_tokens < 1:
        raise InvalidRequest(f"max_tokens is {sampling.max_tokens}: it must be at least 1")
    if not (math.isfinite(sampling.temperature) and sampling.temperature >= 0.0):
        raise InvalidRequest(f"temperature is {sampling.temperature}: it must be finite and at least 0")
    if not 0.0 < sampling.top_p <= 1.0:
        raise InvalidRequest(f"top_p is {sampling.top_p}: it must be in (0, 1]")


def check_tokens(tokens: Sequence[int], vocab_size: int) -> None:
    """Raises InvalidRequest for no tokens, or one outside the vocabulary."""
    if not tokens:
        raise InvalidRequest("the prompt has no tokens: send a longer one")
    highest = max(tokens)
    if min(tokens) < 0 or highest >= vocab_size:
        wrong = highest if highest >= vocab_size else min(tokens)
        raise InvalidRequest(f"token id {wrong} is out of the vocabulary: ids go from 0 to {vocab_size - 1}")


def promise_blocks(prompt_tokens: int, max_tokens: int, headroom_tokens: int) -> int:
    """Blocks that a decode worker promises: the prompt, and the completion up to the headroom.

    The last token of a completion needs no room: nothing is computed behind it.
    """
    return blocks_for(prompt_tokens + min(max_tokens - 1, headroom_tokens))
