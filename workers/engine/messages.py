"""What goes into and comes out of an engine: values only, so that it can be a thread or a process."""

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from pdserve.core.errors import PdserveError
from pdserve.core.types import BlockName, FinishReason, OwnerId, SamplingParams, SequenceId, TokenLogprobs
from pdserve.workers.engine.debt import Debt


@dataclass(frozen=True, slots=True)
class SequenceSpec:
    """One sequence to run. Until its last output the engine alone changes `owner`'s table."""

    sequence_id: SequenceId
    owner: OwnerId
    """Whose table in the pool holds this sequence's blocks; no other live sequence has the same."""
    token_ids: tuple[int, ...]
    """The prompt; after a resume the prompt and the tokens so far."""
    chain: tuple[BlockName, ...]
    """Names of the full blocks of `token_ids`."""
    namespace: bytes
    """Root of the chain, 16 bytes; full blocks of sampled tokens extend it."""
    sampling: SamplingParams | None
    """None: prefill only. Every position of `token_ids` is computed, nothing is sampled, and at the end, also
    after an abort or a failure, the table is left to the submitter. Else the engine releases it at the end.
    `seed` is the choice's own; `max_tokens` counts the completion as a whole, `prior_tokens` included."""
    num_computed: int = 0
    """Leading positions whose KV lies in the owner's table already. Above 0 the table has room for all of
    `token_ids`, as after a committed handoff; at 0 it is empty."""
    prior_tokens: int = 0
    """How many of the last `token_ids` are completion tokens that were emitted before (a resume)."""
    debt: Debt | None = None
    """Booked in the pool when the sequence has to yield, before its blocks are anybody's."""


@dataclass(frozen=True, slots=True)
class SequenceOutput:
    """What one step did for one sequence. The last one has a finish reason or an error, never both."""

    sequence_id: SequenceId
    num_computed: int
    """Leading positions whose KV is computed; falls to 0 when the sequence is preempted."""
    first_index: int
    """Index in the completion of the first of `new_token_ids`, or of the next token where there is none."""
    new_token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason | None
    """A prefill-only sequence ends with LENGTH: it computed all that was asked."""
    error: PdserveError | None
    cached_tokens: int
    """Prompt tokens that came from the prefix cache at the first admission."""
    started_at: float | None
    """Clock reading in seconds, as the next two: the sequence's first step began."""
    prefill_ended_at: float | None
    """Prefill only: the end of the last chunk's step. Sampling: the start of the step that samples first."""
    first_token_at: float | None
    """The end of the step with which the first token became certain: it may have been held back before."""
    logprobs: tuple[TokenLogprobs, ...] = ()
    """One per token of `new_token_ids` where `sampling.logprobs` asks for them."""


@dataclass(frozen=True, slots=True)
class StepOutputs:
    """One step's news, at most one message per step."""

    step: int
    items: tuple[SequenceOutput, ...]


@dataclass(frozen=True, slots=True)
class EngineStats:
    """The engine as of its last step."""

    progress: int
    """Steps so far. While anything is queued it grows, also when memory is what everything waits for."""
    running: int
    waiting: int
    queued_prefill_tokens: int
    """Prompt tokens still to compute, of running and waiting sequences."""
    queued_prefills: int
    """The sequences that these belong to."""
    prefills: int
    """Prompts whose computing has begun, so far."""
    prefill_busy_s: float
    """Time of the steps that computed prompts, so far."""
    context_tokens: int
    """Computed positions of the running sequences."""
    preemptions: int
    preempted_blocks: int
    """Blocks that preempted sequences wait for: theirs before anybody's who comes later."""
    perf: Mapping[str, float]
    """What the performance model has learnt: `PerfModel.snapshot()`."""


class EngineClient(Protocol):
    """The one way to an engine."""

    async def start(self) -> None: ...

    async def stop(self) -> None:
        """Abort what lives, end `outputs`, wait until the engine has ended. Idempotent."""

    def submit(self, spec: SequenceSpec) -> None:
        """Hand a sequence over. What is wrong with it comes back as its output.

        Raises Unavailable once stopped, or the error that ended the engine.
        """

    def abort(self, sequence_id: SequenceId) -> None:
        """End a sequence at the next step boundary with FinishReason.ABORT; nothing if it is not live."""

    def outputs(self) -> AsyncIterator[StepOutputs]:
        """All outputs, for one reader. Ends at `stop`; raises the error that ended the engine."""

    def stats(self) -> EngineStats:
        """Never blocks for a step. Raises the error that ended the engine."""

    def set_role_weight(self, weight: float) -> None:
        """1: the token budget is for prefill, 0: for decode. Takes effect at the next step."""

    def check_integrity(self) -> None:
        """Raise IntegrityError or InternalError where books differ. Blocks for at most one step."""
