"""The arithmetic of a step in torch: a decoder over the pool's tensor, then the sampler."""

from typing import Protocol

import torch

from pdserve.workers.attention.batch import SequenceChunk, StepBatch
from pdserve.workers.engine.runner import BatchSpec
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
    def run(self, batch: BatchSpec) -> list[int]:
        """See `ModelRunner.run`. Raises InternalError where the logits are not finite."""
        chunks = [SequenceChunk(c.token_ids, c.start, c.blocks, c.sampling is not None) for c in batch.chunks]
        logits = self._model.forward(StepBatch.build(chunks, self._kv.device), self._kv)
        requests = [
            SampleRequest(c.sampling, c.sampling.seed, c.end) for c in batch.chunks if c.sampling is not None
        ]
        return sample(logits, requests)
