"""What a decoder asks of an attention implementation."""

from dataclasses import dataclass
from typing import Protocol

import torch

from pdserve.workers.attention.batch import StepBatch


@dataclass(frozen=True, slots=True)
class AttentionRule:
    """How one layer scores: score = soft_cap(scale x q . k), over the last `window` positions."""

    scale: float
    window: int | None = None
    """Positions that a query sees, its own included; None: all before it."""
    soft_cap: float | None = None
    """Scores s become cap x tanh(s / cap) before the softmax."""


class Attention(Protocol):
    """Causal grouped-query attention over paged KV.

    `kv_layer` is one layer's view of the pool, [blocks, K|V, kv heads, 16, head_dim]; the pool's owner keeps
    the memory, `write` is the only one to change it, and only in the slots that the batch names. A row's
    result must not depend on what a block holds beyond its context, be it NaN of a former owner.
    """

    def write(self, kv_layer: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: StepBatch) -> None:
        """Store k (after rope) and v, both [T, kv heads, head_dim], in the batch's slots."""
        ...

    def attend(
        self, q: torch.Tensor, kv_layer: torch.Tensor, batch: StepBatch, rule: AttentionRule
    ) -> torch.Tensor:
        """Attend q [T, heads, head_dim] (after rope) to each row's own context, its own position included.

        Returns [T, heads, head_dim] in q's dtype.
        """
        ...
