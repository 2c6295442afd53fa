"""Equal names mean equal KV: the same tokens behind the same tokens of the same model and tenant."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.kvtransfer.names import (
    NAME_BYTES,
    LogicalSchema,
    chain,
    extend,
    namespace,
    pack_chain,
    pack_tokens,
    unpack_chain,
    unpack_tokens,
)

SCHEMA = LogicalSchema("tiny", "00ff", num_layers=2, num_kv_heads=1, head_dim=8)
GOLDEN_NAME = "0f31de6291212221fe0853bb31689022"
token = st.integers(min_value=0, max_value=2**32 - 1)
prompt = st.lists(token, max_size=80)


@given(prompt)
def test_only_full_blocks_have_names(tokens: list[int]) -> None:
    names = chain(b"root", tokens)
    assert len(names) == len(tokens) // 16
    assert all(len(name) == NAME_BYTES for name in names)


@given(prompt, prompt)
def test_names_of_a_prefix_are_a_prefix_of_the_names(tokens: list[int], more: list[int]) -> None:
    names = chain(b"root", tokens)
    assert chain(b"root", tokens + more)[: len(names)] == names


@given(prompt)
def test_extending_block_by_block_is_the_chain(tokens: list[int]) -> None:
    parent, names = b"root", []
    for start in range(0, len(tokens) - 15, 16):
        parent = extend(parent, tokens[start : start + 16])
        names.append(parent)
    assert tuple(names) == chain(b"root", tokens)


@given(st.lists(token, min_size=48, max_size=48), st.integers(0, 47))
def test_a_changed_token_changes_every_name_from_its_block_on(tokens: list[int], at: int) -> None:
    changed = [*tokens[:at], tokens[at] ^ 1, *tokens[at + 1 :]]
    for block, (old, new) in enumerate(zip(chain(b"r", tokens), chain(b"r", changed), strict=True)):
        assert (old == new) == (block < at // 16)


def test_another_namespace_shares_no_name() -> None:
    tokens = list(range(64))
    roots = [namespace(SCHEMA.digest()), namespace(SCHEMA.digest(), b"tenant")]
    first, second = (chain(root, tokens) for root in roots)
    assert not set(first) & set(second)


@pytest.mark.parametrize("length", [0, 15, 17])
def test_a_part_of_a_block_has_no_name(length: int) -> None:
    with pytest.raises(ValueError, match="16 tokens"):
        extend(b"root", [1] * length)


def test_every_field_of_the_schema_counts() -> None:
    changed = [
        replace(SCHEMA, model="other"),
        replace(SCHEMA, weights_digest="00fe"),
        replace(SCHEMA, num_layers=3),
        replace(SCHEMA, num_kv_heads=2),
        replace(SCHEMA, head_dim=16),
        replace(SCHEMA, block_tokens=32),
        replace(SCHEMA, protocol=2),
    ]
    digests = {schema.digest() for schema in (SCHEMA, *changed)}
    assert len(digests) == 1 + len(changed)
    assert all(len(digest) == NAME_BYTES for digest in digests)


def test_a_name_never_changes_between_versions() -> None:
    """Names live in redis and on disk: a new value here needs a new PROTOCOL."""
    assert chain(namespace(SCHEMA.digest()), range(16))[0].hex() == GOLDEN_NAME


@given(prompt)
def test_tokens_survive_packing(tokens: list[int]) -> None:
    packed = pack_tokens(tokens)
    assert unpack_tokens(packed) == tuple(tokens)
    assert packed == b"".join(value.to_bytes(4, "little") for value in tokens)


@given(prompt)
def test_chains_survive_packing(tokens: list[int]) -> None:
    names = chain(b"root", tokens)
    assert unpack_chain(pack_chain(names)) == names


def test_a_torn_chain_is_refused() -> None:
    with pytest.raises(ValueError, match="17"):
        unpack_chain(b"x" * 17)
