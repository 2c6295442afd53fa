"""The real SmolLM2-135M: the packaged GGUF gives what transformers gives from the same file."""

import torch
from decoder_oracle import all_logits, oracle_logits, poisoned_kv, shuffled_table
from transformers import AutoModelForCausalLM

from pdserve.core.catalog import DEMO_MODEL, resolve_model
from pdserve.workers.models.decoder import Decoder

# "The capital of France is Paris, and the capital of Germany is" and a tail of arbitrary ids.
PROMPT = [504, 3575, 282, 4649, 314, 7042, 28, 284, 260, 3575, 282, 8022, 314, *range(1000, 9000, 391)]


def test_demo_model_logits_equal_transformers() -> None:
    path = resolve_model(DEMO_MODEL)
    oracle = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    expected = oracle_logits(oracle, PROMPT)
    del oracle
    decoder = Decoder.load(path)
    table = shuffled_table(len(PROMPT), 8)
    actual = all_logits(decoder, poisoned_kv(decoder, 8), PROMPT, table, [20, len(PROMPT) - 21, 1])
    assert decoder.config.eos_token_ids == (2,)
    assert torch.equal(actual.argmax(dim=-1), expected.argmax(dim=-1))
    torch.testing.assert_close(actual, expected, atol=5e-4, rtol=1e-4)
