"""Every family, rope and window gives transformers' logits and its greedy tokens through the paged path."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from decoder_oracle import (
    all_logits,
    family,
    llama,
    oracle_logits,
    poisoned_kv,
    prompt,
    saved,
    shuffled_table,
)
from tiny_families import FAMILIES, WINDOW

from pdserve.core.types import blocks_for
from pdserve.workers.attention.batch import SequenceChunk, StepBatch
from pdserve.workers.models.decoder import Decoder

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    "yarn": YARN,
    "yarn-without-truncation": {**YARN, "truncate": False, "beta_fast": 16.0, "beta_slow": 2.0},
    "yarn-attention-factor": {**YARN, "attention_factor": 1.5},
    "yarn-mscale": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.1},
}


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def assert_same_logits(decoder: Decoder, model: Any, tokens: int, chunks: list[int]) -> None:
    ids, blocks = prompt(tokens, seed=tokens), blocks_for(tokens) + 3
    actual = all_logits(decoder, poisoned_kv(decoder, blocks), ids, shuffled_table(tokens, blocks), chunks)
    assert_close(actual, oracle_logits(model, ids))


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Decoder, Any]:
    model = family(request.param)
    return Decoder.load(saved(model, tmp_path_factory.mktemp("model"))), model


@pytest.mark.parametrize(
    "chunks",
    [[70], [16, 1, 31, 22], [19, 20, 21, 10], [50] + [1] * 20],
    ids=["whole", "uneven chunks", "around the window", "then token by token"],
)
def test_logits_equal_transformers_over_shuffled_poisoned_blocks(
    pair: tuple[Decoder, Any], chunks: list[int]
) -> None:
    assert_same_logits(*pair, 70, chunks)


def test_a_prompt_longer_than_a_query_tile_equals_transformers(pair: tuple[Decoder, Any]) -> None:
    assert_same_logits(*pair, 300, [10, 290])


def test_greedy_tokens_equal_transformers(pair: tuple[Decoder, Any]) -> None:
    decoder, model = pair
    kv = poisoned_kv(decoder, 12)
    for seed, length in enumerate((1, 17, 45)):
        theirs = prompt(length, seed)
        for _ in range(12):
            theirs.append(int(oracle_logits(model, theirs)[-1].argmax()))
        ours, table, done = prompt(length, seed), shuffled_table(64, 12, seed), 0
        while len(ours) < len(theirs):
            chunk = SequenceChunk(ours[done:], done, table, True)
            done = len(ours)
            ours.append(int(decoder.forward(StepBatch.build([chunk]), kv)[0].argmax()))
        assert ours == theirs


def test_bfloat16_is_as_close_to_float32_as_transformers_is(
    pair: tuple[Decoder, Any], tmp_path: Path
) -> None:
    _, model = pair
    decoder = Decoder.load(saved(model, tmp_path), dtype=torch.bfloat16)
    rounded = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    ids = prompt(60)
    exact, theirs = oracle_logits(model, ids), oracle_logits(rounded, ids)
    ours = all_logits(decoder, poisoned_kv(decoder, 4), ids, [2, 0, 3, 1], [30, 29, 1])
    assert (ours - exact).norm() <= 1.25 * (theirs - exact).norm()


@pytest.mark.parametrize("rope", sorted(ROPES))
def test_every_rope_scaling_equals_transformers(tmp_path: Path, rope: str) -> None:
    model = llama(rope_parameters=ROPES[rope])
    plain = llama(rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    ids = prompt(70, seed=70)
    same = torch.equal(oracle_logits(model, ids), oracle_logits(plain, ids))
    assert same == (rope == "dynamic"), "the oracle does not see this scaling"
    assert_same_logits(Decoder.load(saved(model, tmp_path)), model, 70, [40, 30])


@pytest.mark.parametrize("window", [1, 2, 16, 17])
def test_windows_of_every_size_equal_transformers(tmp_path: Path, window: int) -> None:
    model = family("mistral-window", sliding_window=window)
    assert_same_logits(Decoder.load(saved(model, tmp_path)), model, 70, [20, 30] + [1] * 20)


def test_a_window_reaches_further_back_than_it_is_long_through_layers(pair: tuple[Decoder, Any]) -> None:
    """A block that fell out of every window still counts: freeing it would change the answer."""
    decoder, _ = pair
    if all(layer.window is None for layer in decoder.config.layers):
        return
    assert {layer.window for layer in decoder.config.layers} <= {WINDOW, None}
    ids = prompt(60)
    other = [ids[0] + 1 if ids[0] + 1 < 160 else 3, *ids[1:]]
    logits = [all_logits(decoder, poisoned_kv(decoder, 4), x, [0, 1, 2, 3], [60]) for x in (ids, other)]
    assert not torch.equal(logits[0][WINDOW + 5], logits[1][WINDOW + 5])


def test_a_window_as_long_as_the_context_is_none(tmp_path: Path) -> None:
    decoder = Decoder.load(saved(family("mistral-window", sliding_window=512), tmp_path))
    assert all(layer.window is None for layer in decoder.config.layers)


def test_gemma3_in_the_form_of_transformers_4_reads_the_same(tmp_path: Path) -> None:
    folder = saved(family("gemma3"), tmp_path)
    new = Decoder.load(folder).config
    config = json.loads((folder / "config.json").read_text())
    del config["rope_parameters"]
    config |= {
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }
    (folder / "config.json").write_text(json.dumps(config))
    assert Decoder.load(folder).config == new
