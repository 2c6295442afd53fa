"""Tiny random models with their transformers oracle, and paged runs of a Decoder."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tiny_families import FAMILIES, PLAIN_ROPE, randomised
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from pdserve.core.types import blocks_for
from pdserve.workers.attention.batch import SequenceChunk, StepBatch
from pdserve.workers.models.decoder import Decoder

VOCAB = 160
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(7)
    return randomised(LlamaForCausalLM(LlamaConfig(**{**_SIZES, "rope_parameters": LLAMA3_ROPE, **changes})))


def qwen2(**changes: Any) -> Qwen2ForCausalLM:
    torch.manual_seed(8)
    sizes = {**_SIZES, "num_attention_heads": 4, "hidden_size": 64, "rope_parameters": PLAIN_ROPE, **changes}
    return randomised(Qwen2ForCausalLM(Qwen2Config(**sizes)))


def family(name: str, **changes: Any) -> Any:
    """A tiny model of the family, 160 tokens."""
    return FAMILIES[name].build(vocab_size=VOCAB, eos_token_id=2, **changes)


def saved(model: Any, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    return folder


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def oracle_logits(model: Any, token_ids: Sequence[int]) -> torch.Tensor:
    """float32 [tokens, vocab]"""
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([list(token_ids)]), use_cache=False).logits[0]
    return logits.float()


def poisoned_kv(decoder: Decoder, blocks: int) -> torch.Tensor:
    """A pool whose former owners left NaN everywhere."""
    return torch.full(decoder.config.kv_shape(blocks), torch.nan, dtype=decoder.dtype)


def shuffled_table(tokens: int, blocks: int, seed: int = 0) -> list[int]:
    order = torch.randperm(blocks, generator=torch.Generator().manual_seed(seed)).tolist()
    return order[: blocks_for(tokens)]


def all_logits(
    decoder: Decoder, kv: torch.Tensor, token_ids: Sequence[int], table: Sequence[int], chunks: Sequence[int]
) -> torch.Tensor:
    """Logits of every token, the tokens run in steps of the given sizes."""
    assert sum(chunks) == len(token_ids)
    logits, start = [], 0
    for size in chunks:
        batch = StepBatch.build([SequenceChunk(token_ids[start : start + size], start, table, True)])
        logits.append(decoder.forward(replace(batch, logit_rows=torch.arange(size)), kv))
        start += size
    return torch.cat(logits)
