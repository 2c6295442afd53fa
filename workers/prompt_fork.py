"""From one prompt's KV to the tables of all choices: full blocks shared, the partial one copied."""

from collections.abc import Callable, Sequence

from pdserve.core.types import BlockId, OwnerId, hit_limit
from pdserve.kvtransfer.pool.pool import KvPool
from pdserve.workers.choice import ChoiceStart

CopyBlocks = Callable[[Sequence[BlockId], Sequence[BlockId]], None]
"""Copies whole blocks of the pool's storage, sources to targets."""


class PromptFork:
    """Runs while no sequence of the request lives, so nobody writes what is copied or shared."""

    def __init__(self, pool: KvPool, copy_blocks: CopyBlocks) -> None:
        self._pool = pool
        self._copy = copy_blocks

    def starts(self, source: OwnerId, prompt_tokens: int, choices: int) -> list[ChoiceStart]:
        """One table per choice out of the source's, which holds the KV of all positions but the last.

        The first choice goes on in the source's own table where that has a block for the last position. A
        choice for which there is no block now starts with nothing: the engine finds it the shared blocks by
        name, and room for the rest, when its turn comes.
        """
        shared, table = hit_limit(prompt_tokens), self._pool.table(source)
        partial = table[shared:]
        owners = [OwnerId(f"{source}/{index}") for index in range(choices)]
        if partial:
            owners[0] = source
        computed = dict.fromkeys(owners, prompt_tokens - 1)
        try:
            for owner in owners[1:] if partial else owners:
                fresh = self._pool.fork(source, owner, shared, 1)
                if fresh is None:
                    computed[owner] = 0
                elif partial:
                    self._copy(partial, fresh)
        except BaseException:
            for owner in (source, *owners):
                self._pool.release(owner)
            raise
        if not partial:
            self._pool.release(source)
        return [ChoiceStart(owner, computed[owner]) for owner in owners]
