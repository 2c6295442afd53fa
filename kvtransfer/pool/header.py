"""The first page of a pool's shared memory, and where the rest lies behind it.

    page 0              header: what a process that maps the pool checks before it reads
    from page 1         generations: uint64 [num_blocks], padded to a page
    behind them         blocks: [num_blocks, block_bytes], unless they are in a GPU's memory

All numbers are little-endian.
"""

import struct
from dataclasses import dataclass

from pdserve.core.errors import Unavailable

PAGE_BYTES = 4096
MAGIC = b"PDSRVKV2"
TOKEN_BYTES = 16
EXPORTED_OFFSET = PAGE_BYTES // 2
"""One byte, 1 while the owner lets peers read. Readers check it before and after they copy."""
_FIELDS = struct.Struct(f"<8sQQ16s{TOKEN_BYTES}s?")


@dataclass(frozen=True, slots=True)
class PoolHeader:
    """`token` is random for each pool, so that a reused pid and fd number is never taken for this memory."""

    num_blocks: int
    block_bytes: int
    fingerprint: bytes
    token: bytes
    on_host: bool = True
    """Whether the blocks follow, or are in a GPU's memory."""

    @property
    def generations_offset(self) -> int:
        return PAGE_BYTES

    @property
    def blocks_offset(self) -> int:
        return PAGE_BYTES + -(-self.num_blocks * 8 // PAGE_BYTES) * PAGE_BYTES

    @property
    def total_bytes(self) -> int:
        """Size of the whole mapping."""
        return self.blocks_offset + (self.num_blocks * self.block_bytes if self.on_host else 0)

    def pack(self) -> bytes:
        return _FIELDS.pack(
            MAGIC, self.num_blocks, self.block_bytes, self.fingerprint, self.token, self.on_host
        )

    @classmethod
    def unpack(cls, page: bytes) -> "PoolHeader":
        """Read a header; Unavailable where the memory is not, or no longer, a pool."""
        magic, num_blocks, block_bytes, fingerprint, token, on_host = _FIELDS.unpack_from(page)
        if magic != MAGIC:
            raise Unavailable(f"the mapped memory is no open KV pool: magic {magic!r}, expected {MAGIC!r}")
        return cls(num_blocks, block_bytes, fingerprint, token, on_host)
