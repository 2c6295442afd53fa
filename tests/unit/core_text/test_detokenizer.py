"""Incremental text is certain text: it is never taken back, and in the end it is all of it."""

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from pdserve.core.text.detokenizer import IncrementalDetokenizer

WORDS = ["▁", "a", "▁a", "b", "▁b", "é", "<0xZZ", "\ufffd"]


def byte_level() -> tokenizers.Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, "th", "Ġth", "ðŁ", "ðŁĺ"])}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, [("t", "h"), ("Ġ", "th"), ("ð", "Ł"), ("ðŁ", "ĺ")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return with_added_tokens(backend)


def byte_fallback() -> tokenizers.Tokenizer:
    """As Llama 2 has it: words with ▁, single bytes as <0x..>, a stripped leading space."""
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]
    backend = tokenizers.Tokenizer(
        models.BPE({token: i for i, token in enumerate(tokens)}, [], byte_fallback=True, unk_token="<unk>")
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return with_added_tokens(backend)


def metaspace() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(WORDS)}, []))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return with_added_tokens(backend)


def with_added_tokens(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    backend.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    backend.add_tokens([AddedToken("<tool é 😀>"), AddedToken("  ")])
    return backend


BACKENDS = {"byte_level": byte_level(), "byte_fallback": byte_fallback(), "metaspace": metaspace()}


def detokenizer(backend: tokenizers.Tokenizer) -> IncrementalDetokenizer:
    special = (i for i, token in backend.get_added_tokens_decoder().items() if token.special)
    return IncrementalDetokenizer(backend, backend.get_vocab_size(), frozenset(special))


def stream(backend: tokenizers.Tokenizer, ids: list[int]) -> list[str]:
    incremental = detokenizer(backend)
    return [*(incremental.push(token_id) for token_id in ids), incremental.finish()]


@pytest.mark.parametrize("name", BACKENDS)
@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_any_ids_concatenate_to_their_decoding(name: str, data: st.DataObject) -> None:
    backend = BACKENDS[name]
    ids = data.draw(st.lists(st.integers(0, backend.get_vocab_size() - 1), max_size=40))
    assert "".join(stream(backend, ids)) == backend.decode(ids, skip_special_tokens=True)


@settings(deadline=None, max_examples=100)
@given(ids=st.lists(st.sampled_from(range(1, 265)), max_size=20))
def test_byte_runs_between_words_concatenate_to_their_decoding(ids: list[int]) -> None:
    backend = BACKENDS["byte_fallback"]
    assert "".join(stream(backend, ids)) == backend.decode(ids)


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback"])
@settings(deadline=None, max_examples=150)
@given(text=st.text(max_size=30))
def test_text_comes_back_without_a_replacement_on_the_way(name: str, text: str) -> None:
    backend = BACKENDS[name]
    pieces = stream(backend, backend.encode(text, add_special_tokens=False).ids)
    for special in ("<s>", "</s>"):
        text = text.replace(special, "")
    assert "".join(pieces) == text
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


def test_a_character_split_over_tokens_appears_whole() -> None:
    backend = BACKENDS["byte_level"]
    pieces = stream(backend, backend.encode("a😀b").ids)
    assert [piece for piece in pieces if piece] == ["a", "😀", "b"]


def test_plain_text_is_not_held_back() -> None:
    for name in ("byte_level", "byte_fallback"):
        backend = BACKENDS[name]
        incremental = detokenizer(backend)
        pieces = [incremental.push(token_id) for token_id in backend.encode("a b a").ids]
        assert "".join(pieces) == "a b a"
        assert incremental.finish() == ""


def test_half_a_character_at_the_end_becomes_a_replacement_only_there() -> None:
    for name in ("byte_level", "byte_fallback"):
        backend = BACKENDS[name]
        half = backend.encode("a😀").ids[:-1]
        *pieces, rest = stream(backend, half)
        assert "".join(pieces) == "a"
        assert set(rest) == {"\ufffd"}


def test_special_tokens_give_no_text_and_do_not_break_a_character() -> None:
    backend = BACKENDS["byte_level"]
    end = backend.token_to_id("</s>")
    ids = backend.encode("é").ids
    assert stream(backend, [end, ids[0], end, ids[1], end]) == ["", "", "", "é", "", ""]
