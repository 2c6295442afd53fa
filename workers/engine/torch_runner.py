"""The arithmetic of a step in torch: a decoder over the pool's tensor, then the sampler."""

from collections.abc import Sequence
from typing import Protocol

import torch

from pdserve.workers.attention.batch import SequenceChunk, StepBatch
from pdserve.workers.engine.logit_edits import edit_logits
from pdserve.workers.engine.logprobs import token_logprobs
from pdserve.workers.engine.runner import BatchSpec, ChunkSpec, Sampled
from pdserve.workers.engine.sampler import SampleRequest, sample


class ForwardModel(Protocol):
    """The part of `Decoder` that a runner uses."""

    def forward(self, batch: StepBatch, kv: torch.Tensor) -> torch.Tensor:
        """Write KV into `kv` [blocks, layers, 2, kv heads, 16, head dim]; return float32 [R, vocab]."""


class TorchRunner:
    """Borrows the pool's tensor for as long as it lives; owns nothing that outlasts a step."""

    def __init__(self, model: ForwardModel, kv: torch.Tensor) -> None:
        self._model = model
        self._kv = kv

    @torch.inference_mode()
    def run(self, batch: BatchSpec) -> list[Sampled]:
        """See `ModelRunner.run`. Raises InternalError where the logits are not finite."""
        chunks = [SequenceChunk(c.token_ids, c.start, c.blocks, c.sampling is not None) for c in batch.chunks]
        logits = self._model.forward(StepBatch.build(chunks, self._kv.device), self._kv)
        return sample_chunks(logits, [chunk for chunk in batch.chunks if chunk.sampling is not None])


def sample_chunks(logits: torch.Tensor, chunks: Sequence[ChunkSpec]) -> list[Sampled]:
    """One token per row of `logits`, which are the chunks' and are written to."""
    requests = [SampleRequest(c.sampling, c.sampling.seed, c.end) for c in chunks if c.sampling is not None]
    tops = {row: k for row, request in enumerate(requests) if (k := request.params.logprobs) is not None}
    edits = {row: chunk.edits for row, chunk in enumerate(chunks) if chunk.edits is not None}
    raw = logits[list(tops)] if tops else None  # a copy: the edits come after it
    edit_logits(logits, edits)
    tokens = sample(logits, requests)
    if raw is None:
        return [Sampled(token) for token in tokens]
    reports = token_logprobs(raw, [tokens[row] for row in tops], list(tops.values()))
    by_row = dict(zip(tops, reports, strict=True))
    return [Sampled(token, by_row.get(row)) for row, token in enumerate(tokens)]
