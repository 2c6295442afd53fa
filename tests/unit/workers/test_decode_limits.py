"""What comes past the router is held to the same ranges at the worker, before anything is promised for it."""

from typing import Any

import pytest

from pdserve.core.errors import ContextTooLong, InvalidRequest
from pdserve.core.types import BLOCK_TOKENS, RequestId, SamplingParams
from pdserve.workers.decode_limits import DecodeLimits
from pdserve.workers.decode_request import DecodeAsk

LIMITS = DecodeLimits(vocab_size=512, context_tokens=200, pool_blocks=8)


def ask(tokens: tuple[int, ...] = (1, 2, 3), **sampling: Any) -> DecodeAsk:
    return DecodeAsk(
        request_id=RequestId("r"),
        token_ids=tokens,
        chain=(),
        namespace=b"",
        sampling=SamplingParams(**sampling),
        candidates=(),
        deadline=None,
    )


@pytest.mark.parametrize(
    ("sampling", "says"),
    [
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"n": 129}, "n is 129"),
        ({"stop": ("a",) * 65}, "stop has 65 entries"),
        ({"stop_token_ids": (512,)}, "stop_token_ids has token id 512"),
        ({"logit_bias": ((600, 1.0),)}, "logit_bias has token id 600"),
    ],
)
def test_sampling_is_checked_again(sampling: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        LIMITS.check(ask(**sampling))
    LIMITS.check(ask(max_tokens=8))


def test_what_no_waiting_helps_is_refused_with_both_numbers() -> None:
    room = 8 * BLOCK_TOKENS
    LIMITS.check(ask(max_tokens=room - 2))
    with pytest.raises(ContextTooLong, match="need 9 KV blocks, this worker's pool has 8"):
        LIMITS.check(ask(max_tokens=room - 1))
    with pytest.raises(ContextTooLong, match="need 201 positions, the model has 200"):
        LIMITS.check(ask(max_tokens=199))
    with pytest.raises(InvalidRequest, match="token id 512"):
        LIMITS.check(ask((1, 512)))
