"""An engine over the tiny model and its tokenizer, with logits wider than the vocabulary of the tokenizer."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from engine_harness import make_spec

from pdserve.core.clock import MonotonicClock
from pdserve.core.config import EngineConfig
from pdserve.core.perfmodel import PerfModel
from pdserve.core.text.tokenizer import Tokenizer
from pdserve.core.types import FinishReason, SamplingParams
from pdserve.kvtransfer.pool.layout import KvLayout
from pdserve.kvtransfer.pool.pool import KvPool
from pdserve.workers.attention.batch import StepBatch
from pdserve.workers.engine.constraint import ConstraintCompiler
from pdserve.workers.engine.engine import Engine
from pdserve.workers.engine.engine_model import EngineModel
from pdserve.workers.engine.torch_runner import TorchRunner
from pdserve.workers.models.decoder import Decoder

PADDING = 14
"""Columns of the logits behind the tokenizer's vocabulary: the likeliest ones, so a slip shows at once."""


@dataclass
class Story:
    """All that an engine said of one sequence."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: str | None = None


class PaddedModel:
    """The decoder, with padding columns."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder

    def forward(self, batch: StepBatch, kv: torch.Tensor) -> torch.Tensor:
        logits = self._decoder.forward(batch, kv)
        return torch.nn.functional.pad(logits, (0, PADDING), value=50.0)


class TinyStack:
    """Loaded once; each `run` has an engine and a pool of its own."""

    def __init__(self, folder: Path) -> None:
        torch.set_num_threads(1)
        self.tokenizer = Tokenizer.load(folder)
        self._decoder = Decoder.load(folder)
        self.compiler = ConstraintCompiler(
            self.tokenizer.to_json(), self.tokenizer.vocab_size + PADDING, self.tokenizer.eos_ids
        )
        self.preemptions = 0

    def run(
        self,
        asks: Sequence[tuple[str, SamplingParams]],
        pool_blocks: int = 1024,
        prior: Sequence[Sequence[int]] = (),
        padded: bool = True,
    ) -> list[Story]:
        """One story per (prompt, parameters); `prior` are completion tokens of an earlier life."""
        engine, pool = self._engine(pool_blocks, padded)
        for number, (prompt, params) in enumerate(asks):
            before = list(prior[number]) if prior else []
            tokens = [*self.tokenizer.encode(prompt), *before]
            engine.submit(make_spec(f"{number}", tokens, params, prior_tokens=len(before)))
        stories = [Story() for _ in asks]
        while engine.has_work:
            for item in engine.step().items:
                story = stories[int(item.sequence_id)]
                story.text += item.text
                story.tokens += item.new_token_ids
                story.logprobs += [report.logprob for report in item.logprobs]
                story.finish_reason = item.finish_reason
                story.error = None if item.error is None else item.error.message
        engine.check_integrity()
        counts = pool.counts()
        assert counts.free + counts.cached == counts.total
        self.preemptions = engine.stats().preemptions
        return stories

    def _engine(self, pool_blocks: int, padded: bool) -> tuple[Engine, KvPool]:
        config = self._decoder.config
        layout = KvLayout(config.num_layers, config.num_kv_heads, config.head_dim, "float32")
        pool = KvPool(layout, pool_blocks, torch.zeros(pool_blocks, dtype=torch.uint64).numpy())
        model = EngineModel(
            max_positions=config.max_position_embeddings,
            eos_ids=self.tokenizer.eos_ids,
            detokenizers=self.tokenizer.detokenizer,
            constraints=self.compiler.matcher,
        )
        runner = TorchRunner(
            PaddedModel(self._decoder) if padded else self._decoder, torch.zeros(config.kv_shape(pool_blocks))
        )
        settings = EngineConfig(token_budget=512, chunk_tokens=128, max_sequences=64, pool_blocks=pool_blocks)
        return Engine(settings, model, pool, runner, MonotonicClock(), PerfModel()), pool
