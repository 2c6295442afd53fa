"""Identifiers and small values that two or more folders share."""

import secrets
from dataclasses import dataclass
from enum import StrEnum
from typing import NewType

RequestId = NewType("RequestId", str)
"""The client's ask, unique in the cluster; the router makes one where the client gave none."""

SequenceId = NewType("SequenceId", str)
"""One choice of a request inside an engine: `<request id>/<choice index>`."""

HandoffId = NewType("HandoffId", str)
"""One prefill-to-decode transaction; a retry at the next candidate is a new handoff."""

WorkerId = NewType("WorkerId", str)
"""A worker's name, which survives its restarts: `<role>-<number>`."""

Incarnation = NewType("Incarnation", str)
"""One start of a worker. Whatever an earlier one said is void."""

BlockId = NewType("BlockId", int)
"""Index of a block in one worker's pool; the same on all of its ranks."""

BlockName = NewType("BlockName", bytes)
"""16 bytes: the hash chain over (namespace, parent, tokens) that names a full block's contents."""

OwnerId = NewType("OwnerId", str)
"""Who holds blocks of a pool: a sequence, a handoff side or a reader."""

BLOCK_TOKENS = 16
"""Token positions per KV block, part of the protocol."""


class Role(StrEnum):
    """What a worker's token budget is spent on. Same engine, same process, other numbers."""

    PREFILL = "prefill"
    DECODE = "decode"
    MIXED = "mixed"


class Disaggregation(StrEnum):
    """Who computes a prompt that the cache does not cover, where prefill workers are there."""

    COST = "cost"
    """Whoever delays everybody less, by prediction: a prefill worker, or the owner in its own pool."""
    ALWAYS = "always"
    """A prefill worker; the owner where none serves."""
    NEVER = "never"
    """The owner."""


class FinishReason(StrEnum):
    """Why a sequence ended, in the OpenAI vocabulary."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


def new_incarnation() -> Incarnation:
    """64 random bits: unique without a coordinator, also across hosts and clock steps."""
    return Incarnation(secrets.token_hex(8))


def blocks_for(tokens: int) -> int:
    """Blocks that `tokens` positions occupy."""
    return -(-tokens // BLOCK_TOKENS)


def hit_limit(prompt_tokens: int) -> int:
    """Most full blocks of a prompt that a cache hit may cover.

    The last position always runs at the decode worker, in a block private to its sequence, so that a full
    hit, a resume and a handoff end in one and the same path.
    """
    return max(0, (prompt_tokens - 1) // BLOCK_TOKENS)


class ConstraintKind(StrEnum):
    """The languages that `Constraint.source` can be written in."""

    JSON_SCHEMA = "json_schema"
    """A JSON Schema as JSON text; `{}` is any JSON value."""
    JSON_OBJECT = "json_object"
    """Any JSON object; the source is empty."""
    REGEX = "regex"
    """A regular expression that the whole text matches."""
    CHOICE = "choice"
    """A JSON array of strings, one of which the whole text is."""
    GRAMMAR = "grammar"
    """A Lark grammar."""


@dataclass(frozen=True, slots=True)
class Constraint:
    """What the text of a completion must be, enforced token by token."""

    kind: ConstraintKind
    source: str


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen, and when a completion ends. Defaults are off; ranges: core/request_limits.py.

    Order: constraint and bans (min_tokens), logit_bias, penalties, temperature, min_p, top_k, top_p.
    """

    max_tokens: int = 128
    """A chat that does not say gets what context and pools leave, from the router."""
    temperature: float = 0.0
    """0, and whatever is below 1e-5, is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    """Tokens less likely than this share of the likeliest one are out."""
    seed: int = 0
    """Choice i of a request samples with `core.seed.derive_seed(seed, i)`."""
    n: int = 1
    """Choices; each is a sequence of its own over the same prompt's blocks."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in prompt or completion."""
    presence_penalty: float = 0.0
    """Subtracted once from tokens that the completion has."""
    frequency_penalty: float = 0.0
    """Subtracted as often as the completion has the token."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, what is added to its logit); -100 bans."""
    stop: tuple[str, ...] = ()
    """Texts that end the completion and are cut off it."""
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    """Neither the end of the sequence nor a stop ends it before."""
    ignore_eos: bool = False
    logprobs: int | None = None
    """None: none are reported; k: the sampled token's and the k likeliest ones', before penalties."""
    constraint: Constraint | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural logarithms of the model's own probabilities at one position, before any penalty or cut."""

    token_id: int
    logprob: float
    rank: int
    """1: it was the likeliest."""
    top: tuple[tuple[int, float], ...]
    """(token id, logprob), the likeliest first."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one request. `cached_tokens` are prompt tokens that no worker had to compute for it."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
