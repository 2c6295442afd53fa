"""A sequence: the engine's state of one choice of a request."""

from enum import StrEnum

from pdserve.core.errors import InternalError, PdserveError
from pdserve.core.types import (
    BLOCK_TOKENS,
    BlockId,
    BlockName,
    FinishReason,
    OwnerId,
    SequenceId,
    TokenLogprobs,
    blocks_for,
)
from pdserve.kvtransfer.names import extend
from pdserve.workers.engine.emission import Emission, Emitter
from pdserve.workers.engine.logit_rules import LogitRules
from pdserve.workers.engine.messages import SequenceOutput, SequenceSpec


class SequenceState(StrEnum):
    """WAITING → RUNNING ⇄ PREEMPTED; FINISHED from any of them."""

    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED = "finished"


_MOVES = frozenset(
    {
        (SequenceState.WAITING, SequenceState.RUNNING),
        (SequenceState.RUNNING, SequenceState.PREEMPTED),
        (SequenceState.PREEMPTED, SequenceState.RUNNING),
        (SequenceState.WAITING, SequenceState.FINISHED),
        (SequenceState.RUNNING, SequenceState.FINISHED),
        (SequenceState.PREEMPTED, SequenceState.FINISHED),
    }
)


class Sequence:
    """Tokens, names, blocks and progress of one choice.

    `blocks` repeats the owner's table in the pool, which nobody but the engine changes while the sequence
    lives; `check_integrity` compares them. Only the engine's thread touches a sequence.
    """

    def __init__(
        self,
        spec: SequenceSpec,
        arrival: int,
        emitter: Emitter | None = None,
        rules: LogitRules | None = None,
    ) -> None:
        """`arrival` is the engine's count of sequences. `emitter` and `rules` have seen the prior tokens; no
        emitter where nothing is sampled, no rules where no logit is changed.
        """
        self.spec = spec
        self.arrival = arrival
        self.rules = rules
        self.state = SequenceState.WAITING
        self.tokens: list[int] = list(spec.token_ids)
        self.names: list[BlockName] = list(spec.chain)
        self.blocks: list[BlockId] = []
        self.num_computed = 0
        self.cached_tokens = 0
        self.started_at: float | None = None
        self.prefill_ended_at: float | None = None
        self.first_token_at: float | None = None
        self._named_blocks = 0
        self._emitted = spec.prior_tokens
        self._stop_ids = frozenset(spec.sampling.stop_token_ids if spec.sampling is not None else ())
        self._emitter = emitter

    @property
    def sequence_id(self) -> SequenceId:
        return self.spec.sequence_id

    @property
    def owner(self) -> OwnerId:
        return self.spec.owner

    @property
    def samples(self) -> bool:
        """Whether tokens are asked for; if not, it is prefill only."""
        return self.spec.sampling is not None

    @property
    def remaining(self) -> int:
        """Tokens whose KV is not computed yet."""
        return len(self.tokens) - self.num_computed

    @property
    def is_decoding(self) -> bool:
        """One token is left to run and the next one is sampled from it."""
        return self.samples and self.remaining == 1

    @property
    def needs_block(self) -> bool:
        """Whether the last token lies past the blocks."""
        return len(self.blocks) < blocks_for(len(self.tokens))

    @property
    def prompt_tokens(self) -> int:
        return len(self.spec.token_ids) - self.spec.prior_tokens

    @property
    def completion_tokens(self) -> int:
        """Tokens sampled so far, those of before a resume included."""
        return len(self.tokens) - self.prompt_tokens

    def move(self, state: SequenceState) -> None:
        """Raises InternalError for a move that the life of a sequence does not have."""
        if (self.state, state) not in _MOVES:
            raise InternalError(f"sequence {self.sequence_id} cannot go from {self.state} to {state}")
        self.state = state

    def place(self, blocks: list[BlockId], computed: int) -> None:
        """Take over a table whose first `computed` positions hold this sequence's KV."""
        if self.state is SequenceState.WAITING and not self.spec.num_computed:
            self.cached_tokens = min(computed, self.prompt_tokens)
        self.blocks = blocks
        self.num_computed = computed
        self._named_blocks = computed // BLOCK_TOKENS

    def displace(self) -> None:
        """Forget the blocks, which went back to the pool; tokens, names and text stay."""
        self.blocks = []
        self.num_computed = 0
        self._named_blocks = 0

    def advance(self, count: int) -> list[tuple[BlockId, BlockName]]:
        """Count `count` more positions as computed; return the blocks that are full and final with it."""
        self.num_computed += count
        full = self.num_computed // BLOCK_TOKENS
        while len(self.names) < full:
            start = len(self.names) * BLOCK_TOKENS
            parent = self.names[-1] if self.names else self.spec.namespace
            self.names.append(extend(parent, self.tokens[start : start + BLOCK_TOKENS]))
        named, self._named_blocks = self._named_blocks, full
        return list(zip(self.blocks[named:full], self.names[named:full], strict=True))

    def append(self, token: int, logprobs: TokenLogprobs | None, eos_ids: frozenset[int]) -> Emission:
        """Take a sampled token; return what became certain with it, and the reason if it is the last one.

        `logprobs` are the token's, held back together with it. Raises InvalidRequest where the sequence's
        constraint cannot go on with the token.
        """
        sampling, emitter = self.spec.sampling, self._emitter
        if sampling is None or emitter is None:
            raise InternalError(f"sequence {self.sequence_id} is prefill only and was given token {token}")
        self.tokens.append(token)
        may_stop = self.completion_tokens >= sampling.min_tokens
        is_eos = token in eos_ids and not sampling.ignore_eos
        stops = may_stop and (is_eos or token in self._stop_ids)
        if self.rules is not None:
            self.rules.take(token)
        is_complete = self.rules is not None and self.rules.is_complete
        reason = FinishReason.STOP if stops or is_complete else None
        if reason is None and self.completion_tokens >= sampling.max_tokens:
            reason = FinishReason.LENGTH
        emission = emitter.push(token, logprobs, reason, armed=may_stop, silent=stops)
        self._emitted += len(emission.token_ids)
        return emission

    def output(
        self,
        emission: Emission | None = None,
        *,
        finish_reason: FinishReason | None = None,
        error: PdserveError | None = None,
    ) -> SequenceOutput:
        """This moment as a message. With `emission`, what `append` just returned, comes its own reason."""
        said = emission or Emission(finish_reason=finish_reason)
        return SequenceOutput(
            sequence_id=self.sequence_id,
            num_computed=self.num_computed,
            first_index=self._emitted - len(said.token_ids),
            new_token_ids=said.token_ids,
            text=said.text,
            finish_reason=said.finish_reason,
            error=error,
            cached_tokens=self.cached_tokens,
            started_at=self.started_at,
            prefill_ended_at=self.prefill_ended_at,
            first_token_at=self.first_token_at,
            logprobs=said.logprobs,
        )
