"""What is refused at the door, with the value that was sent, the limit, and what to do. Pure."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from pdserve.core.errors import ContextTooLong, InvalidRequest, UnknownModel
from pdserve.core.types import BLOCK_TOKENS, SamplingParams, blocks_for
from pdserve.core.worker_record import WorkerRecord
from pdserve.router.prompt import Chat, Prompt, TokenIds, prompt_bytes

LONGEST_REQUEST_ID = 128
AS_LONG_AS_FITS = 2**32 - 1
"""More tokens than any context has: `bound_completion` makes it what fits."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What the workers of one pool can take."""

    context_tokens: int
    vocab_size: int
    decode_blocks: int
    """Blocks of the largest pool that can own requests."""
    every_decode_blocks: int
    """Blocks that each of these pools has."""
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
            every_decode_blocks=min(decode, default=0),
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


def default_completion(sampling: SamplingParams, prompt: Prompt) -> SamplingParams:
    """Without max_tokens, an answer in a chat may be as long as fits; other prompts keep the default."""
    return replace(sampling, max_tokens=AS_LONG_AS_FITS) if isinstance(prompt, Chat) else sampling


def check_length(prompt_tokens: int, limits: Limits) -> None:
    """Raises ContextTooLong for a prompt that leaves no room for a completion, whatever is in it."""
    if prompt_tokens >= limits.context_tokens:
        raise ContextTooLong(
            f"the prompt has {prompt_tokens} tokens, the context {limits.context_tokens}, completion "
            "included: send a shorter prompt"
        )


def bound_completion(
    sampling: SamplingParams, asked: bool, prompt_tokens: int, limits: Limits
) -> SamplingParams:
    """The default of max_tokens shrinks to what context and decode pools leave; what was asked is refused.

    A default that only the largest pools could hold would keep the others idle: where every pool has room for
    an answer of common length, the default fits each. Raises ContextTooLong.
    """
    in_context = limits.context_tokens - prompt_tokens
    in_pool = limits.decode_blocks * BLOCK_TOKENS - prompt_tokens + 1  # the last token needs no room
    in_every_pool = in_pool - (limits.decode_blocks - limits.every_decode_blocks) * BLOCK_TOKENS
    completion = sampling.max_tokens if asked else max(1, sampling.min_tokens)
    if completion > in_context:
        raise ContextTooLong(
            f"prompt and completion need {prompt_tokens} + {completion} tokens, the context has "
            f"{limits.context_tokens}: send a shorter prompt or ask for fewer tokens"
        )
    if completion > in_pool:
        raise ContextTooLong(
            f"prompt and completion need {prompt_tokens} + {completion} tokens, the largest decode pool has "
            f"{limits.decode_blocks} blocks of {BLOCK_TOKENS} tokens: send a shorter prompt, ask for fewer "
            f"tokens or raise engine.pool_blocks"
        )
    if asked:
        return sampling
    common = max(completion, SamplingParams().max_tokens)
    in_pools = in_every_pool if in_every_pool >= common else in_pool
    return replace(sampling, max_tokens=min(sampling.max_tokens, in_context, in_pools))


def check_promise(promise: int, n: int, limits: Limits) -> None:
    """Raises ContextTooLong for choices that no decode pool can ever promise together."""
    if promise > limits.decode_blocks:
        raise ContextTooLong(
            f"the prompt with {n} choices needs a promise of {promise} blocks, the largest decode pool has "
            f"{limits.decode_blocks} blocks of {BLOCK_TOKENS} tokens: ask for fewer choices or tokens, or "
            f"raise engine.pool_blocks"
        )


def check_prefill(prompt_tokens: int, limits: Limits) -> None:
    """Raises ContextTooLong for a prompt that no prefill pool can ever hold."""
    prefill = blocks_for(prompt_tokens - 1)
    if limits.prefill_blocks is not None and prefill > limits.prefill_blocks:
        raise ContextTooLong(
            f"the prompt of {prompt_tokens} tokens needs {prefill} blocks to prefill, the largest prefill "
            f"pool has {limits.prefill_blocks} blocks of {BLOCK_TOKENS} tokens: send a shorter prompt"
        )
