"""Whether tokens are what transformers would choose greedily for a tiny model."""

import random
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import LlamaForCausalLM


class GreedyReference:
    """One model's judge, float32, and a source of prompts for it."""

    def __init__(self, model: Path) -> None:
        self.model = model
        self._decoder = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32)

    def prompt(self, seed: str, tokens: int) -> list[int]:
        """Random bytes: no two prompts share a block."""
        return random.Random(seed).choices(range(256), k=tokens)

    @property
    def bytes_per_token(self) -> int:
        """Of its KV."""
        config = self._decoder.config
        head_dim = config.hidden_size // config.num_attention_heads
        return int(2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * 4)

    def first_wrong(self, prompt: Sequence[int], tokens: Sequence[int]) -> int | None:
        """Index of the first token that greedy decoding would not have chosen; None if there is none.

        One pass over all of them: each is judged behind those before it.
        """
        if not tokens:
            return None
        with torch.inference_mode():
            logits = self._decoder(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
        wrong = logits.argmax(-1) != torch.tensor(tokens)
        return int(wrong.nonzero()[0]) if wrong.any() else None
