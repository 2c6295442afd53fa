"""Where one handoff's chunks land in D's pool: what to copy, and whether what came is what P computed."""

from dataclasses import dataclass

from pdserve.core.types import BLOCK_TOKENS, BlockId, HandoffId, blocks_for
from pdserve.kvtransfer.digest import verify
from pdserve.kvtransfer.handoff.wire import Chunk
from pdserve.kvtransfer.pool.storage import KvStorage
from pdserve.kvtransfer.transports.base import Grant, Segment


@dataclass(frozen=True, slots=True)
class Landing:
    """The reserved table of one handoff. Chunks are P's, in order; `positions` travel."""

    handoff: HandoffId
    epoch: int
    positions: int
    table: tuple[BlockId, ...]
    reused: int
    """Leading blocks of the table that D held already: nothing lands there."""
    storage: KvStorage

    def grant(self, chunk: Chunk) -> Grant:
        """The copies that bring the chunk here."""
        last = blocks_for(self.positions) - 1
        segments = tuple(
            Segment(
                source,
                generation,
                self.table[index],
                chunk.last_valid_tokens if index == last else BLOCK_TOKENS,
            )
            for index, (source, generation) in enumerate(
                zip(chunk.blocks, chunk.generations, strict=True), chunk.first
            )
            if index >= self.reused
        )
        return Grant(self.handoff, self.epoch, chunk.seq, segments)

    def find_damage(self, chunk: Chunk, grant: Grant) -> str | None:
        """What is wrong with the landed bytes; None if nothing is, or P sent no digests. For a thread."""
        if chunk.digests is None:
            return None
        size, skipped = len(chunk.digests) // len(chunk.blocks), len(chunk.blocks) - len(grant.segments)
        for at, segment in enumerate(grant.segments, skipped):
            block = self.storage.read_blocks([segment.destination])[0]
            expected = chunk.digests[at * size : (at + 1) * size]
            bad = verify(block, self.storage.layout, segment.valid_tokens, expected)
            if bad is not None:
                part = "V" if bad.is_value else "K"
                return f"{part} of layer {bad.layer}, head {bad.head}, block {chunk.first + at} of the prompt"
        return None
