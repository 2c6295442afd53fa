"""The engine over a real decoder in float32: who shares a step changes nobody's tokens."""

from pathlib import Path

import pytest
import torch
from engine_harness import HoldingDetokenizer, make_spec
from transformers import LlamaConfig, LlamaForCausalLM

from pdserve.core.clock import MonotonicClock
from pdserve.core.config import EngineConfig
from pdserve.core.perfmodel import PerfModel
from pdserve.core.types import FinishReason, SamplingParams
from pdserve.kvtransfer.pool.layout import KvLayout
from pdserve.kvtransfer.pool.pool import KvPool
from pdserve.workers.engine.engine import Engine
from pdserve.workers.engine.engine_model import EngineModel
from pdserve.workers.engine.torch_runner import TorchRunner
from pdserve.workers.models.decoder import Decoder

SIZES = {
    "vocab_size": 120,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
}
NEW_TOKENS = 16
PROMPTS = [
    torch.randint(3, 120, (5 + 9 * i,), generator=torch.Generator().manual_seed(i)).tolist() for i in range(8)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def decoder(folder: Path) -> Decoder:
    return Decoder.load(folder)


def params(number: int) -> SamplingParams:
    """Greedy and random ones side by side."""
    temperature = 0.0 if number % 2 else 0.9
    return SamplingParams(NEW_TOKENS, temperature=temperature, top_p=0.95, seed=number, ignore_eos=True)


def completions(decoder: Decoder, numbers: list[int], pool_blocks: int, chunk_tokens: int) -> list[list[int]]:
    config = decoder.config
    layout = KvLayout(config.num_layers, config.num_kv_heads, config.head_dim, "float32")
    kv = torch.full(config.kv_shape(pool_blocks), torch.nan)
    generations = torch.zeros(pool_blocks, dtype=torch.uint64).numpy()
    pool = KvPool(layout, pool_blocks, generations)
    engine = Engine(
        EngineConfig(token_budget=48, chunk_tokens=chunk_tokens, pool_blocks=pool_blocks),
        EngineModel(config.max_position_embeddings, frozenset(), HoldingDetokenizer),
        pool,
        TorchRunner(decoder, kv),
        MonotonicClock(),
        PerfModel(),
    )
    for number in numbers:
        engine.submit(make_spec(f"s{number}", PROMPTS[number], params(number)))
    tokens: dict[str, list[int]] = {f"s{number}": [] for number in numbers}
    while engine.has_work:
        for item in engine.step().items:
            assert item.error is None
            assert item.finish_reason in (None, FinishReason.LENGTH)
            tokens[item.sequence_id] += item.new_token_ids
        engine.check_integrity()
    assert (engine.stats().preemptions > 0) == (pool_blocks < 16)
    return [tokens[f"s{number}"] for number in numbers]


@pytest.fixture(scope="module")
def alone(decoder: Decoder) -> list[list[int]]:
    return [completions(decoder, [number], pool_blocks=64, chunk_tokens=48)[0] for number in range(8)]


@pytest.mark.parametrize(("pool_blocks", "chunk_tokens"), [(64, 48), (64, 7), (12, 16)])
def test_a_batch_of_eight_equals_each_alone(
    decoder: Decoder, alone: list[list[int]], pool_blocks: int, chunk_tokens: int
) -> None:
    assert completions(decoder, list(range(8)), pool_blocks, chunk_tokens) == alone


def test_greedy_sequences_equal_transformers(folder: Path, alone: list[list[int]]) -> None:
    oracle = LlamaForCausalLM.from_pretrained(folder)
    for number in (1, 3, 5, 7):
        prompt = torch.tensor([PROMPTS[number]])
        ids = oracle.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=0,
        )
        assert ids[0, prompt.shape[1] :].tolist() == alone[number]
