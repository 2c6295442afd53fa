"""From one prompt's KV to the tables of all choices: full blocks shared, the partial one copied."""

import asyncio
from collections.abc import Callable, Sequence

from pdserve.core.types import BlockId, OwnerId, hit_limit
from pdserve.kvtransfer.pool.pool import KvPool
from pdserve.workers.choice import ChoiceStart

CopyBlocks = Callable[[Sequence[BlockId], Sequence[BlockId]], None]
"""Copies whole blocks of the pool's storage, sources to targets."""


class PromptFork:
    """Runs while no sequence of the request lives, so nobody writes what is copied or shared.

    A private block is growth, as a decoding sequence's next block is: within the request's promise, taken at
    once or not at all, and so outside of the order of `Reservations`. Nobody holds and waits: a choice that
    gets none holds nothing, and stands in the engine's queue behind those that were preempted. A request
    forks once, and newcomers yield, so who waits for memory is overtaken by requests that run already only.
    """

    def __init__(self, pool: KvPool, copy_blocks: CopyBlocks) -> None:
        self._pool = pool
        self._copy = copy_blocks

    async def starts(self, source: OwnerId, prompt_tokens: int, choices: int) -> list[ChoiceStart]:
        """One table per choice out of the source's, which holds the KV of all positions but the last.

        Takes the source's table over: after an error or a cancel there is none left. The first choice goes on
        in it where it has a block for the last position. A choice for which there is no block now starts with
        nothing: the engine finds it the shared blocks by name, and room for the rest, when its turn comes.
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
                await asyncio.sleep(0)  # a long prompt's choice takes milliseconds
        except BaseException:
            for owner in (source, *owners):
                self._pool.release(owner)
            raise
        if not partial:
            self._pool.release(source)
        return [ChoiceStart(owner, computed[owner]) for owner in owners]
