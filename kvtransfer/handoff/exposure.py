"""What P shows of one prompt, chunk by chunk, and what a reader may therefore ask for."""

import asyncio
from dataclasses import replace

from pdserve.core.types import BLOCK_TOKENS, OwnerId, blocks_for
from pdserve.kvtransfer.digest import digest_blocks
from pdserve.kvtransfer.handoff.messages import Chunk
from pdserve.kvtransfer.pool.pool import KvPool
from pdserve.kvtransfer.pool.storage import KvStorage
from pdserve.kvtransfer.transports.base import Grant


class Exposure:
    """The chunks of `owner`'s table so far; its blocks stay where they are as long as the owner has them."""

    def __init__(
        self, pool: KvPool, storage: KvStorage, owner: OwnerId, positions: int, *, digest: bool
    ) -> None:
        """`positions` are shown in the end, each chunk with its digests if the reader wants them."""
        self._pool = pool
        self._storage = storage
        self._owner = owner
        self._positions = positions
        self._digest = digest
        self._chunks: list[Chunk] = []

    def __getitem__(self, seq: int) -> Chunk:
        return self._chunks[seq]

    def allows(self, grant: Grant) -> bool:
        """Whether it names blocks of its chunk alone. The caller knows that there is such a chunk."""
        chunk = self._chunks[grant.seq]
        exposed = set(zip(chunk.blocks, chunk.generations, strict=True))
        return all((segment.source, segment.generation) in exposed for segment in grant.segments)

    def __len__(self) -> int:
        return len(self._chunks)

    async def grow(self, num_computed: int) -> bool:
        """Show what `num_computed` positions make final: full blocks, in the end also the last partial one.

        False where that is nothing new. Raises ValueError where the owner has fewer blocks than that.
        """
        first = self._chunks[-1].end if self._chunks else 0
        whole = num_computed == self._positions
        end = blocks_for(num_computed) if whole else num_computed // BLOCK_TOKENS
        if end <= first:
            return False
        blocks = self._pool.table(self._owner)[first:end]
        if len(blocks) != end - first:
            raise ValueError(f"the engine computed {end} blocks and {self._owner} has {first + len(blocks)}")
        chunk = Chunk(
            seq=len(self._chunks),
            first=first,
            blocks=blocks,
            generations=tuple(self._pool.generation(block) for block in blocks),
            last_valid_tokens=min(BLOCK_TOKENS, self._positions - BLOCK_TOKENS * (end - 1)),
            digests=None,
        )
        self._chunks.append(await asyncio.to_thread(self._digested, chunk))
        return True

    def _digested(self, chunk: Chunk) -> Chunk:
        """In a thread: the chunk, in memory for every reader, with its digests if the reader wants them."""
        storage, last = self._storage, len(chunk.blocks) - 1
        storage.settle()
        if not self._digest:
            return chunk
        valid = [BLOCK_TOKENS] * last + [chunk.last_valid_tokens]
        digests = digest_blocks(*storage.readable(chunk.blocks), storage.layout, valid)
        return replace(chunk, digests=digests)
