"""What transformers answers greedily."""

from collections.abc import Sequence
from typing import Any

import torch


def greedy_tokens(model: Any, prompt: Sequence[int], count: int) -> tuple[int, ...]:
    """The next `count` tokens, each from a forward pass over everything before it, with no cache."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return tuple(ids[len(prompt) :])
