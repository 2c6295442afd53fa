"""Gemma's GGUF tokenizer is read by ourselves and equals what transformers makes of the same vocabulary."""

from pathlib import Path

import gguf
import pytest

from pdserve.core.errors import ConfigError
from pdserve.core.text.tokenizer import Tokenizer

TEXTS = ("", "ab", " ab", "abc  ab\n\nba", "héllo ☃ <s>ab</s>", "a" * 9, "c b a abab")
BYTES = [f"<0x{number:02X}>" for number in range(256)]
WORDS = {
    "▁": -9.0,
    "a": -1.0,
    "b": -2.0,
    "c": -6.0,
    "ab": -3.0,
    "▁a": -5.0,
    "▁ab": -4.0,
    "aba": -7.0,
    "▁▁": -8.0,
}


def write(path: Path, arch: str, scores: int | None = None) -> Path:
    pieces = ["<unk>", "<s>", "</s>", *BYTES, *WORDS]
    writer = gguf.GGUFWriter(path, arch)
    for add in (writer.add_context_length, writer.add_embedding_length, writer.add_feed_forward_length):
        add(64)
    writer.add_block_count(1)
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(len(pieces))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    writer.add_token_scores(([0.0] * 259 + list(WORDS.values()))[:scores])
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * len(WORDS))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gemma_is_tokenized_as_transformers_tokenizes_gemma2(tmp_path: Path) -> None:
    """transformers reads gemma2 files but not gemma's; the vocabulary is the same kind."""
    ours = Tokenizer.load(write(tmp_path / "gemma.gguf", "gemma"))
    theirs = Tokenizer.load(write(tmp_path / "gemma2.gguf", "gemma2"))
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text))


@pytest.mark.parametrize("text", TEXTS[:4])
def test_text_without_special_tokens_comes_back(tmp_path: Path, text: str) -> None:
    tokenizer = Tokenizer.load(write(tmp_path / "gemma.gguf", "gemma"))
    ids = tokenizer.encode(text)
    assert ids[0] == 1
    assert tokenizer.decode(ids) == text


def test_a_token_without_a_score_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"268 tokens and 260 scores; .*download the file again"):
        Tokenizer.load(write(tmp_path / "gemma.gguf", "gemma", scores=260))
