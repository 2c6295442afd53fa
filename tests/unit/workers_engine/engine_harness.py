"""An engine over a real pool, with a hash of what lies in the KV as its model: mixed-up blocks show."""

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from pdserve.core.clock import ManualClock
from pdserve.core.config import EngineConfig
from pdserve.core.perfmodel import PerfModel
from pdserve.core.types import BLOCK_TOKENS, OwnerId, SamplingParams, SequenceId
from pdserve.kvtransfer.names import chain
from pdserve.kvtransfer.pool.layout import KvLayout
from pdserve.kvtransfer.pool.pool import KvPool
from pdserve.workers.engine.engine import Engine
from pdserve.workers.engine.engine_model import EngineModel
from pdserve.workers.engine.messages import SequenceOutput, SequenceSpec, StepOutputs
from pdserve.workers.engine.runner import BatchSpec, ChunkSpec, Sampled

ROOT = b"namespace-of-16b"
VOCAB = 40
EOS = 0


def next_token(context: Iterable[int], params: SamplingParams, position: int) -> int:
    """The model: a function of the whole context, of the seed and of the new token's position."""
    key = repr((list(context), params.seed, position)).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=4).digest(), "big") % VOCAB


def expected_tokens(prompt: Iterable[int], params: SamplingParams) -> list[int]:
    """The completion that an undisturbed sequence has."""
    context, tokens = list(prompt), []
    while len(tokens) < params.max_tokens:
        token = next_token(context, params, len(context))
        tokens.append(token)
        context.append(token)
        if token == EOS and not params.ignore_eos:
            break
    return tokens


class HashRunner:
    """Writes each token into (block, offset) and reads the context back through the block table."""

    def __init__(self, num_blocks: int) -> None:
        self.kv = [[-1] * BLOCK_TOKENS for _ in range(num_blocks)]
        self.batches: list[BatchSpec] = []
        self.fail_next: Exception | None = None

    def run(self, batch: BatchSpec) -> list[Sampled]:
        self.batches.append(batch)
        if self.fail_next is not None:
            error, self.fail_next = self.fail_next, None
            raise error
        written = [self._write(chunk) for chunk in batch.chunks]
        slots = [slot for chunk_slots in written for slot in chunk_slots]
        assert len(slots) == len(set(slots)), "two sequences of one step write to one slot"
        return [Sampled(self._sample(c, c.sampling)) for c in batch.chunks if c.sampling is not None]

    def _write(self, chunk: ChunkSpec) -> list[tuple[int, int]]:
        slots = []
        for position, token in enumerate(chunk.token_ids, chunk.start):
            block, offset = chunk.blocks[position // BLOCK_TOKENS], position % BLOCK_TOKENS
            self.kv[block][offset] = token
            slots.append((block, offset))
        return slots

    def _sample(self, chunk: ChunkSpec, params: SamplingParams) -> int:
        context = [self.kv[chunk.blocks[p // BLOCK_TOKENS]][p % BLOCK_TOKENS] for p in range(chunk.end)]
        return next_token(context, params, chunk.end)


class HoldingDetokenizer:
    """Holds the text of the last token back, as a detokenizer does with half a character."""

    def __init__(self) -> None:
        self.held = ""

    def push(self, token_id: int) -> str:
        text, self.held = self.held, f"<{token_id}>"
        return text

    def finish(self) -> str:
        text, self.held = self.held, ""
        return text


class TickingClock(ManualClock):
    """Every reading is a second after the one before."""

    def now(self) -> float:
        self.advance(1.0)
        return super().now()


class Harness:
    """An engine, its pool, and all that it ever said."""

    def __init__(
        self,
        pool_blocks: int = 64,
        token_budget: int = 64,
        chunk_tokens: int = 32,
        max_sequences: int = 8,
        role_weight: float = 1.0,
        max_positions: int = 4096,
    ) -> None:
        self.pool = KvPool(KvLayout(1, 1, 1, "float32"), pool_blocks, np.zeros(pool_blocks, dtype=np.uint64))
        self.runner = HashRunner(pool_blocks)
        self.clock = TickingClock()
        self.perf = PerfModel()
        config = EngineConfig(
            token_budget=token_budget,
            chunk_tokens=chunk_tokens,
            max_sequences=max_sequences,
            pool_blocks=pool_blocks,
        )
        model = EngineModel(max_positions, frozenset({EOS}), HoldingDetokenizer)
        self.engine = Engine(config, model, self.pool, self.runner, self.clock, self.perf, role_weight)
        self.steps: list[StepOutputs] = []

    def submit(self, name: str, prompt: Iterable[int], params: SamplingParams | None, **fields: Any) -> None:
        self.engine.submit(make_spec(name, prompt, params, **fields))

    def commit(self, name: str, prompt: list[int], params: SamplingParams, **fields: Any) -> SequenceSpec:
        """Blocks with the KV of all but the last position, as a committed handoff leaves them."""
        blocks = self.pool.reserve(OwnerId(name), -(-len(prompt) // BLOCK_TOKENS))
        assert blocks is not None
        for position, token in enumerate(prompt[:-1]):
            self.runner.kv[blocks[position // BLOCK_TOKENS]][position % BLOCK_TOKENS] = token
        self.pool.commit(OwnerId(name))
        return make_spec(name, prompt, params, num_computed=len(prompt) - 1, **fields)

    def step(self) -> StepOutputs:
        """One step, after which all books must agree."""
        outputs = self.engine.step()
        self.steps.append(outputs)
        self.engine.check_integrity()
        return outputs

    def run(self, limit: int = 2000) -> None:
        """Step until nothing lives."""
        for _ in range(limit):
            if not self.engine.has_work:
                return
            self.step()
        raise AssertionError(f"sequences still live after {limit} steps: {self.engine.stats()}")

    def items(self, name: str) -> list[SequenceOutput]:
        return [item for step in self.steps for item in step.items if item.sequence_id == name]

    def last(self, name: str) -> SequenceOutput:
        return self.items(name)[-1]

    def tokens(self, name: str) -> list[int]:
        """All tokens said for a sequence; their indices must go up without a gap or a repetition."""
        items = self.items(name)
        tokens = [token for item in items for token in item.new_token_ids]
        indices = [item.first_index + i for item in items for i in range(len(item.new_token_ids))]
        assert indices == list(range(indices[0], indices[0] + len(indices))) if indices else True
        return tokens

    def text(self, name: str) -> str:
        return "".join(item.text for item in self.items(name))


def make_spec(name: str, prompt: Iterable[int], params: SamplingParams | None, **fields: Any) -> SequenceSpec:
    token_ids = tuple(prompt)
    return SequenceSpec(
        sequence_id=SequenceId(name),
        owner=OwnerId(name),
        token_ids=token_ids,
        chain=chain(ROOT, token_ids),
        namespace=ROOT,
        sampling=params,
        **fields,
    )


def prompt_of(length: int, salt: int = 0) -> list[int]:
    """Tokens that differ from those of another salt from the first on."""
    return [1 + (7 * i + 13 * salt + i * i * (salt + 1)) % (VOCAB - 1) for i in range(length)]


def greedy(max_tokens: int, seed: int = 0, ignore_eos: bool = True) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, seed=seed, ignore_eos=ignore_eos)
