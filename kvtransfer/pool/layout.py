"""What one block of KV looks like in memory; the arithmetic that every reader of a pool shares."""

import hashlib
from dataclasses import dataclass

from pdserve.core.errors import ConfigError
from pdserve.core.types import BLOCK_TOKENS

_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class KvLayout:
    """A block is `[num_layers, 2 (K, V), num_kv_heads, block_tokens, head_dim]` of `dtype`, C order.

    A *segment* is one (layer, K|V, head) of a block: `[block_tokens, head_dim]`, contiguous, so the first
    `n` tokens of a segment are its first `n * token_bytes` bytes.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    block_tokens: int = BLOCK_TOKENS

    def __post_init__(self) -> None:
        if self.dtype not in _ITEM_BYTES:
            raise ConfigError(f"KV dtype {self.dtype!r} is unknown; choose one of {sorted(_ITEM_BYTES)}")
        sizes = (self.num_layers, self.num_kv_heads, self.head_dim, self.block_tokens)
        if min(sizes) < 1:
            raise ConfigError(f"every size of a KV layout must be at least 1, got {self}")

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return _ITEM_BYTES[self.dtype]

    @property
    def block_shape(self) -> tuple[int, int, int, int, int]:
        """Shape of one block."""
        return (self.num_layers, 2, self.num_kv_heads, self.block_tokens, self.head_dim)

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in one segment."""
        return self.head_dim * self.itemsize

    @property
    def segment_bytes(self) -> int:
        """Bytes of one (layer, K|V, head) of a block."""
        return self.block_tokens * self.token_bytes

    @property
    def segments_per_block(self) -> int:
        """Number of (layer, K|V, head) in a block."""
        return self.num_layers * 2 * self.num_kv_heads

    @property
    def block_bytes(self) -> int:
        """Bytes of one block."""
        return self.segments_per_block * self.segment_bytes

    def fingerprint(self) -> bytes:
        """16 bytes, equal exactly when raw blocks may be copied from one pool to the other."""
        text = f"kv1 {self.block_shape} {self.dtype}"
        return hashlib.blake2b(text.encode(), digest_size=16).digest()
