"""The seam between the engine's bookkeeping and its arithmetic."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from pdserve.core.types import BlockId, SamplingParams, TokenLogprobs
from pdserve.workers.engine.logit_rules import LogitEdits


@dataclass(frozen=True, slots=True)
class ChunkSpec:
    """What one sequence runs in a step."""

    token_ids: tuple[int, ...]
    """Consecutive tokens, at least one."""
    start: int
    """Position of the first; the KV of all positions before it lies in the blocks."""
    blocks: tuple[BlockId, ...]
    """The blocks of positions 0 … at least the last of `token_ids`."""
    sampling: SamplingParams | None
    """Sample the token after the last of `token_ids`; None: only write KV."""
    edits: LogitEdits | None = None
    """What the sequence's tokens so far do to its logits; None: nothing."""

    @property
    def end(self) -> int:
        """Position after the last token: the index of the token that is sampled."""
        return self.start + len(self.token_ids)


@dataclass(frozen=True, slots=True)
class BatchSpec:
    """One step, at least one chunk."""

    chunks: tuple[ChunkSpec, ...]


class Sampled(NamedTuple):
    """The new token of one chunk."""

    token: int
    logprobs: TokenLogprobs | None = None
    """Where the chunk's `sampling.logprobs` asks for them."""


class ModelRunner(Protocol):
    """Runs one step over the pool's storage. Called by the engine's thread only."""

    def run(self, batch: BatchSpec) -> Sequence[Sampled]:
        """Write the KV of every chunk; return one token per chunk that samples, in the batch's order.

        Any exception fails the sequences of this batch and nothing else.
        """
