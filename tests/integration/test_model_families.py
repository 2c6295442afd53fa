"""Every model family gives transformers' greedy tokens when P computes the prompt and D the answer."""

from pathlib import Path

import pytest
import torch
from decoder_parity import greedy_tokens
from stack import stack, tiny_config
from tiny_families import FAMILIES
from tiny_model import END_ID, add_byte_tokenizer

from pdserve.cluster.redis_server import RedisServer
from pdserve.core.types import Role

TOKENS = 8
LENGTHS = (5, 75)
"""Within one block; several chunks, past the windows."""


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"qwen2-window"}))
async def test_greedy_tokens_equal_transformers_across_the_handoff(
    family: str, tmp_path: Path, redis: RedisServer
) -> None:
    model = FAMILIES[family].build(vocab_size=END_ID + 1, bos_token_id=None, eos_token_id=END_ID)
    add_byte_tokenizer(tmp_path)
    model.save_pretrained(tmp_path)
    config = tiny_config(tmp_path, redis)
    async with stack(config, {"prefill-0": Role.PREFILL, "decode-0": Role.DECODE}) as running:
        assert running.client is not None
        for length in LENGTHS:
            prompt = torch.randint(
                0, 256, (length,), generator=torch.Generator().manual_seed(length)
            ).tolist()
            answer = await running.client.generate(
                token_ids=prompt, max_tokens=TOKENS, temperature=0.0, ignore_eos=True
            )
            assert answer.token_ids == greedy_tokens(model, prompt, TOKENS)
            # Positions 0 … n - 2 are P's to compute, where they fill a block.
            moved = 0 if length <= 16 else -(-(length - 1) // 16)
            assert answer.route.blocks_moved == moved
