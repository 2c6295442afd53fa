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


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen. `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 are off."""

    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one request. `cached_tokens` are prompt tokens that no worker had to compute for it."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
