"""What is refused at the door, with the value that was sent, the limit, and what to do. Pure."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from pdserve.core.errors import ContextTooLong, InvalidRequest, UnknownModel
from pdserve.core.types import BLOCK_TOKENS, SamplingParams, blocks_for
from pdserve.core.worker_record import WorkerRecord
from pdserve.router.prompt import Chat, Prompt, TokenIds, prompt_bytes

LONGEST_REQUEST_ID = 128


@dataclass(frozen=True, slots=True)
class Limits:
    """What the workers of one pool can take."""

    context_tokens: int
    vocab_size: int
    decode_blocks: int
    """Blocks of the largest pool that can own requests."""
    prefill_blocks: int | None
    """Blocks of the largest pool that prefills for others; None where owners prefill themselves."""

    @classmethod
    def of(cls, records: Sequence[WorkerRecord]) -> "Limits":
        """Limits of a pool with at least one worker. Draining workers count: they may be replaced soon."""
        decode = [record.pool_blocks for record in records if record.role_weight < 1.0]
        prefill = [record.pool_blocks for record in records if record.role_weight > 0.0]
        return cls(
            context_tokens=min(record.context_tokens for record in records),
            vocab_size=min(record.vocab_size for record in records),
            decode_blocks=max(decode, default=0),
            prefill_blocks=max(prefill, default=None),
        )


def check_request_id(request_id: str) -> None:
    """Raises InvalidRequest."""
    if len(request_id) > LONGEST_REQUEST_ID or not request_id.isprintable():
        raise InvalidRequest(
            f"request_id has {len(request_id)} characters: send at most {LONGEST_REQUEST_ID} printable ones"
        )


def check_model(model: str, served: Iterable[str]) -> str:
    """The model that is meant; empty means the only one. Raises UnknownModel, which lists them."""
    known = sorted(served)
    if model in known:
        return model
    if not model and len(known) == 1:
        return known[0]
    listed = ", ".join(known)
    if not model:
        raise UnknownModel(f"no model was named, and {len(known)} are served: name one of {listed}")
    raise UnknownModel(f"model {model!r} is not served here: served are {listed}")


def check_prompt(prompt: Prompt | None, max_bytes: int) -> Prompt:
    """What can be said before tokenizing. Raises InvalidRequest or ContextTooLong."""
    if prompt is None or prompt in ("", Chat(()), TokenIds(())):
        raise InvalidRequest("the prompt is empty: send a text, chat messages or token ids")
    size = prompt_bytes(prompt)
    if size > max_bytes:
        raise ContextTooLong(f"the prompt has {size} bytes, the limit is {max_bytes}: send a shorter one")
    return prompt


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


def bound_completion(
    sampling: SamplingParams, asked: bool, prompt_tokens: int, limits: Limits
) -> SamplingParams:
    """The default of max_tokens shrinks to what the context leaves; what was asked for is refused instead.

    Raises ContextTooLong.
    """
    left = limits.context_tokens - prompt_tokens
    if left < 1 or (asked and sampling.max_tokens > left):
        completion = sampling.max_tokens if asked else 1
        raise ContextTooLong(
            f"prompt and completion need {prompt_tokens} + {completion} tokens, the context has "
            f"{limits.context_tokens}: send a shorter prompt or ask for fewer tokens"
        )
    return sampling if asked else replace(sampling, max_tokens=min(sampling.max_tokens, left))


def promise_blocks(prompt_tokens: int, max_tokens: int, headroom_tokens: int) -> int:
    """Blocks that a decode worker promises: the prompt, and the completion up to the headroom."""
    return blocks_for(prompt_tokens + min(max_tokens, headroom_tokens))


def check_fits(prompt_tokens: int, promise: int, limits: Limits) -> None:
    """Raises ContextTooLong for what no pool can ever hold."""
    prefill = blocks_for(prompt_tokens - 1)
    if promise > limits.decode_blocks:
        raise ContextTooLong(
            f"the prompt of {prompt_tokens} tokens needs {promise} blocks with its headroom, the largest "
            f"decode pool has {limits.decode_blocks} blocks of {BLOCK_TOKENS} tokens: send a shorter prompt"
        )
    if limits.prefill_blocks is not None and prefill > limits.prefill_blocks:
        raise ContextTooLong(
            f"the prompt of {prompt_tokens} tokens needs {prefill} blocks to prefill, the largest prefill "
            f"pool has {limits.prefill_blocks} blocks of {BLOCK_TOKENS} tokens: send a shorter prompt"
        )
