"""A cheap identity of a model's weights, for the namespace of KV block names."""

import os
from hashlib import blake2b
from pathlib import Path

from pdserve.core.errors import ConfigError
from pdserve.workers.models.safetensors_loader import weight_files

_MIB = 1 << 20
WHOLE_BYTES = 64 * _MIB
"""Files up to this size are hashed whole."""
HEAD_BYTES = 16 * _MIB
"""Hashed at the start of larger files: more than any safetensors or GGUF header."""
PIECE_BYTES = 64 << 10
STRIDE_BYTES = 4 * _MIB
"""A larger file is sampled by one piece per stride, and its last piece."""


def weights_digest(path: Path) -> str:
    """32 hex digits that name the weights of a model folder or `.gguf` file.

    BLAKE2b-128 over, per file: size and content. Content is the whole file up to 64 MiB; beyond that its
    first 16 MiB (the header: names, shapes, GGUF metadata), 64 KiB of every 4 MiB, and the last 64 KiB.
    So any two headers, sizes, or contents that differ over a stretch of 4 MiB give two digests, and a
    16 GB model costs 270 MB of reads. For a folder config.json counts too (rope decides what KV means), and
    shards count in the order of their names; the names themselves do not, so a renamed copy keeps its digest.

    Raises:
        ConfigError: a file is missing or cannot be read.
    """
    files = [path / "config.json", *weight_files(path)] if path.is_dir() else [path]
    digest = blake2b(digest_size=16, person=b"pdserve weights")
    for file in files:
        try:
            _update(digest, file)
        except OSError as error:
            raise ConfigError(f"cannot read {file}: {error}") from error
    return digest.hexdigest()


def _update(digest: blake2b, file: Path) -> None:
    with file.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        digest.update(size.to_bytes(8, "little"))
        if size <= WHOLE_BYTES:
            while chunk := stream.read(_MIB):
                digest.update(chunk)
            return
        digest.update(stream.read(HEAD_BYTES))
        for offset in (*range(HEAD_BYTES, size - PIECE_BYTES, STRIDE_BYTES), size - PIECE_BYTES):
            stream.seek(offset)
            digest.update(stream.read(PIECE_BYTES))
