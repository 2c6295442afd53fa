"""The digest names contents: stable over copies and names, different for different weights."""

from pathlib import Path

import pytest
from decoder_oracle import llama, qwen2, saved

from pdserve.core.errors import ConfigError
from pdserve.workers.models.digest import HEAD_BYTES, STRIDE_BYTES, WHOLE_BYTES, weights_digest

LARGE = WHOLE_BYTES + 3 * STRIDE_BYTES + 1234


def large_file(path: Path, changed: range | None = None, size: int = LARGE) -> Path:
    with path.open("wb") as stream:
        stream.truncate(size)
        if changed is not None:
            stream.seek(changed.start)
            stream.write(b"\x01" * len(changed))
    return path


def test_a_copy_under_another_name_has_the_same_digest(tmp_path: Path) -> None:
    first, second = tmp_path / "a.gguf", tmp_path / "b.gguf"
    first.write_bytes(b"weights")
    second.write_bytes(b"weights")
    assert weights_digest(first) == weights_digest(second)
    assert len(bytes.fromhex(weights_digest(first))) == 16


def test_one_changed_byte_of_a_small_file_changes_the_digest(tmp_path: Path) -> None:
    file = tmp_path / "a.gguf"
    file.write_bytes(bytes(100_000))
    before = weights_digest(file)
    file.write_bytes(bytes(70_000) + b"\x01" + bytes(29_999))
    assert weights_digest(file) != before


@pytest.mark.parametrize(
    "changed",
    [
        range(HEAD_BYTES - 1, HEAD_BYTES),
        range(30 << 20, (30 << 20) + STRIDE_BYTES),
        range(LARGE - 1, LARGE),
    ],
    ids=["header byte", "any stride", "last byte"],
)
def test_a_large_file_is_sampled_where_weights_differ(tmp_path: Path, changed: range) -> None:
    plain = weights_digest(large_file(tmp_path / "a.gguf"))
    assert weights_digest(large_file(tmp_path / "b.gguf", changed)) != plain


def test_size_alone_changes_the_digest(tmp_path: Path) -> None:
    digests = {weights_digest(large_file(tmp_path / "a.gguf", size=LARGE + n)) for n in range(3)}
    assert len(digests) == 3


def test_folders_of_different_weights_or_configuration_differ(tmp_path: Path) -> None:
    folder = saved(llama(), tmp_path / "llama")
    shards = saved(llama(), tmp_path / "shards", max_shard_size="100KB")
    other = saved(qwen2(), tmp_path / "qwen2")
    again = saved(llama(), tmp_path / "again")
    assert weights_digest(again) == weights_digest(folder)
    (again / "config.json").write_text((again / "config.json").read_text().replace("10000.0", "20000.0"))
    assert len({weights_digest(path) for path in (folder, shards, other, again)}) == 4


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.gguf"):
        weights_digest(tmp_path / "nothing.gguf")
