"""Names of blocks: a hash chain over (namespace, parent, tokens).

A name says *what* a block holds, never how: dtype, page order and the tensor-parallel split are a
representation, tagged beside the name. Equal names mean equal KV, on any worker.
"""

import hashlib
import sys
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pdserve.core.types import BLOCK_TOKENS, BlockName

NAME_BYTES = 16
PROTOCOL = 1


@dataclass(frozen=True, slots=True)
class LogicalSchema:
    """What two workers must share to exchange KV. Workers pair when their digests are equal."""

    model: str
    weights_digest: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_tokens: int = BLOCK_TOKENS
    protocol: int = PROTOCOL

    def digest(self) -> bytes:
        """16 bytes."""
        text = "\0".join(str(getattr(self, name)) for name in self.__slots__)
        return hashlib.blake2b(text.encode(), digest_size=NAME_BYTES).digest()


def namespace(schema: bytes, salt: bytes = b"") -> bytes:
    """The root of every chain: 16 bytes of (logical schema, tenant salt derived by the server)."""
    return hashlib.blake2b(schema + salt, digest_size=NAME_BYTES, person=b"pdserve-ns").digest()


def extend(parent: bytes, tokens: Sequence[int]) -> BlockName:
    """The name of the full block `tokens` behind `parent` (the namespace for the first block)."""
    if len(tokens) != BLOCK_TOKENS:
        raise ValueError(f"a name is for a full block of {BLOCK_TOKENS} tokens, got {len(tokens)}")
    return BlockName(hashlib.blake2b(parent + pack_tokens(tokens), digest_size=NAME_BYTES).digest())


def chain(root: bytes, tokens: Sequence[int]) -> tuple[BlockName, ...]:
    """Names of all full blocks of `tokens`, first to last."""
    names: list[BlockName] = []
    packed = pack_tokens(tokens)
    parent = root
    width = 4 * BLOCK_TOKENS
    for start in range(0, len(packed) - width + 1, width):
        name = hashlib.blake2b(parent + packed[start : start + width], digest_size=NAME_BYTES).digest()
        names.append(BlockName(name))
        parent = name
    return tuple(names)


def pack_tokens(tokens: Iterable[int]) -> bytes:
    """Token ids as little-endian uint32, the wire form inside the cluster."""
    packed = array("I", tokens)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def unpack_tokens(packed: bytes) -> tuple[int, ...]:
    """The inverse of `pack_tokens`."""
    tokens = array("I")
    tokens.frombytes(packed)
    if sys.byteorder == "big":
        tokens.byteswap()
    return tuple(tokens)


def pack_chain(names: Iterable[BlockName]) -> bytes:
    """Names as one blob: what redis and the wire take."""
    return b"".join(names)


def unpack_chain(blob: bytes) -> tuple[BlockName, ...]:
    """The inverse of `pack_chain`."""
    if len(blob) % NAME_BYTES:
        raise ValueError(f"a chain is a multiple of {NAME_BYTES} bytes, got {len(blob)}")
    return tuple(BlockName(blob[at : at + NAME_BYTES]) for at in range(0, len(blob), NAME_BYTES))
