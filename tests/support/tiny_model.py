"""A tiny random checkpoint with a byte-level tokenizer: a whole model folder in a moment."""

import json
from pathlib import Path

import tokenizers
import torch
from transformers import LlamaConfig, LlamaForCausalLM

CONTEXT_TOKENS = 2048


END_ID = 256


def make_tiny_model(folder: Path, *, seed: int = 0) -> Path:
    """2 layers, 4 heads on 2 KV heads, 256 byte tokens and an end: about 0.2 M parameters."""
    add_byte_tokenizer(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=END_ID + 1,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT_TOKENS,
        bos_token_id=None,
        eos_token_id=END_ID,
        initializer_range=0.4,
    )
    LlamaForCausalLM(config).to(torch.float32).save_pretrained(folder)
    return folder


def add_byte_tokenizer(folder: Path) -> None:
    """256 byte tokens, then `<end>`, and a chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: number for number, symbol in enumerate(alphabet)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<end>"])
    backend.save(str(folder / "tokenizer.json"))
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<end>", "chat_template": template})
    )
