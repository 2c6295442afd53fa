"""A decoder computes what transformers computes, however its tokens are cut into steps."""

from pathlib import Path
from typing import Any

import pytest
import torch
from decoder_oracle import (
    all_logits,
    llama,
    oracle_logits,
    poisoned_kv,
    prompt,
    qwen2,
    saved,
    shuffled_table,
)
from transformers import LlamaForCausalLM

from pdserve.core.errors import InternalError
from pdserve.workers.attention.batch import SequenceChunk, StepBatch
from pdserve.workers.models.decoder import Decoder

TOKENS = 150
BLOCKS = 40
MODELS = {
    "llama3-rope-gqa-untied": lambda: llama(tie_word_embeddings=False),
    "llama3-rope-gqa-tied": lambda: llama(tie_word_embeddings=True),
    "llama-all-biases": lambda: llama(attention_bias=True, mlp_bias=True),
    "llama-no-gqa-wide-heads": lambda: llama(num_attention_heads=3, num_key_value_heads=3, head_dim=64),
    "qwen2-qkv-bias": lambda: qwen2(),
    "qwen2-tied": lambda: qwen2(tie_word_embeddings=True),
}


@pytest.fixture(scope="module", params=sorted(MODELS))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Decoder, Any]:
    model = MODELS[request.param]()
    return Decoder.load(saved(model, tmp_path_factory.mktemp("model"))), model


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "chunks",
    [[TOKENS], [48, 1, 31, 70], [16, 16, 118], [140] + [1] * 10],
    ids=["whole", "uneven chunks", "block-aligned chunks", "then token by token"],
)
def test_logits_equal_transformers_over_shuffled_poisoned_blocks(
    pair: tuple[Decoder, Any], chunks: list[int]
) -> None:
    decoder, model = pair
    ids = prompt(TOKENS)
    kv = poisoned_kv(decoder, BLOCKS)
    assert_close(
        all_logits(decoder, kv, ids, shuffled_table(TOKENS, BLOCKS), chunks), oracle_logits(model, ids)
    )


def test_a_prompt_longer_than_a_query_tile_equals_transformers(tmp_path: Path) -> None:
    model = llama()
    decoder = Decoder.load(saved(model, tmp_path))
    ids = prompt(300)
    kv = poisoned_kv(decoder, 30)
    actual = all_logits(decoder, kv, ids, shuffled_table(300, 30), [10, 290])
    assert_close(actual, oracle_logits(model, ids))


def test_a_step_writes_only_the_slots_it_names(tmp_path: Path) -> None:
    decoder = Decoder.load(saved(llama(), tmp_path))
    kv = torch.full(decoder.config.kv_shape(8), 5.0)
    decoder.forward(StepBatch.build([SequenceChunk(prompt(20), 0, [6, 3], False)]), kv)
    written = (kv != 5.0).all(dim=-1).all(dim=3).all(dim=2).all(dim=1)  # [blocks, 16]
    assert written[6].all()
    assert written[3].tolist() == [True] * 4 + [False] * 12
    assert (kv[[0, 1, 2, 4, 5, 7]] == 5.0).all()
    assert (kv[3, :, :, :, 4:] == 5.0).all()


def test_logits_come_for_the_last_row_of_those_who_want_them_in_order(tmp_path: Path) -> None:
    model = llama()
    decoder = Decoder.load(saved(model, tmp_path))
    prompts = [prompt(9, seed=1), prompt(21, seed=2), prompt(1, seed=3)]
    chunks = [
        SequenceChunk(prompts[0], 0, [0], True),
        SequenceChunk(prompts[1], 0, [1, 2], False),
        SequenceChunk(prompts[2], 0, [3], True),
    ]
    logits = decoder.forward(StepBatch.build(chunks), poisoned_kv(decoder, 4))
    expected = torch.stack([oracle_logits(model, prompts[i])[-1] for i in (0, 2)])
    assert logits.dtype == torch.float32
    assert_close(logits, expected)


def test_a_step_without_wanted_logits_returns_no_rows(tmp_path: Path) -> None:
    decoder = Decoder.load(saved(llama(), tmp_path))
    batch = StepBatch.build([SequenceChunk(prompt(5), 0, [0], False)])
    assert decoder.forward(batch, poisoned_kv(decoder, 1)).shape == (0, decoder.config.vocab_size)


def test_bfloat16_is_as_close_to_float32_as_transformers_is(tmp_path: Path) -> None:
    model = llama()
    decoder = Decoder.load(saved(model, tmp_path), dtype=torch.bfloat16)
    rounded = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    ids = prompt(60)
    exact = oracle_logits(model, ids)
    theirs = oracle_logits(rounded, ids)
    ours = all_logits(decoder, poisoned_kv(decoder, 4), ids, [2, 0, 3, 1], [30, 29, 1])
    assert ours.dtype == torch.float32
    assert (ours - exact).norm() <= 1.25 * (theirs - exact).norm()


@pytest.mark.parametrize("fault", ["dtype", "heads", "stride"])
def test_kv_of_another_form_is_refused(tmp_path: Path, fault: str) -> None:
    decoder = Decoder.load(saved(llama(), tmp_path))
    kv = torch.zeros(decoder.config.kv_shape(4))
    wrong = {"dtype": kv.to(torch.bfloat16), "heads": kv[:, :, :, :1].contiguous(), "stride": kv[::2]}[fault]
    with pytest.raises(InternalError, match="this model needs contiguous"):
        decoder.forward(StepBatch.build([SequenceChunk([3], 0, [0], True)]), wrong)
