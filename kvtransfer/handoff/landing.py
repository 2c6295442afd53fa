"""Where one handoff's chunks land in D's pool: what to copy, and whether what came is what P computed."""

from dataclasses import dataclass

from pdserve.core.types import BLOCK_TOKENS, BlockId, HandoffId, blocks_for
from pdserve.kvtransfer.digest import digest_blocks, first_difference
from pdserve.kvtransfer.handoff.messages import Chunk
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
        return Grant(self.handoff, self.epoch, chunk.seq, segments, digest=chunk.digests is not None)

    def find_damage(self, chunk: Chunk, grant: Grant, landed: bytes | None = None) -> str | None:
        """What is wrong with the landed bytes; None if nothing is, or P sent no digests. For a thread.

        `landed` are the digests of what landed where the transport has them; else they are made here.
        """
        if chunk.digests is None or not grant.segments:
            return None
        size, skipped = len(chunk.digests) // len(chunk.blocks), len(chunk.blocks) - len(grant.segments)
        if landed is None:
            landed = self._digest(grant)
        own = len(landed) // len(grant.segments)
        for index in range(len(grant.segments)):
            at = skipped + index
            expected = chunk.digests[at * size : (at + 1) * size]
            found = landed[index * own : (index + 1) * own]
            bad = first_difference(found, expected, self.storage.layout)
            if bad is not None:
                part = "V" if bad.is_value else "K"
                return f"{part} of layer {bad.layer}, head {bad.head}, block {chunk.first + at} of the prompt"
        return None

    def _digest(self, grant: Grant) -> bytes:
        """Digests of what lies in the granted destinations now."""
        destinations = [segment.destination for segment in grant.segments]
        valid = [segment.valid_tokens for segment in grant.segments]
        return digest_blocks(*self.storage.readable(destinations), self.storage.layout, valid)
