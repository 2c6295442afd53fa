"""The books of one worker's KV blocks: who has which, what may be reused, what is promised.

Pure accounting: no tensor, no I/O, no clock. Bytes live in KvStorage; this says whose they are.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pdserve.core.types import BlockId, BlockName, OwnerId
from pdserve.kvtransfer.pool.blocks import Blocks, BlockState
from pdserve.kvtransfer.pool.errors import IntegrityError, PoolError
from pdserve.kvtransfer.pool.layout import KvLayout
from pdserve.kvtransfer.pool.prefix_cache import CacheListener, PrefixCache
from pdserve.kvtransfer.pool.promises import Promises

# In a dict for its order and O(1) membership; an owner has a block at most once.
_Table = dict[BlockId, None]


@dataclass(frozen=True, slots=True)
class PoolCounts:
    """Blocks by state; the six states sum to `total`. `promised` is a claim on the future, not a state."""

    total: int
    free: int
    held: int
    reserved: int
    cached: int
    loading: int
    quarantined: int
    promised: int


class KvPool:
    """One owner of one free list, safe to call from the engine's thread and the I/O loop.

        free ──allocate──► held ──release──► cached (named) or free
        cached ──acquire_prefix, pin──► held            cached ──evict──► free          held ──fork──► held
        free ──reserve──► reserved ──start_loading──► loading ──landed──► reserved ──commit──► held
        reserved ──release──► free                      loading ──release──► quarantined ──drain──► free

    Each call holds one short lock and costs O(1) per block. A call that raises PoolError changed nothing.
    Blocks are reference counted: one reference per owner that has it in its table.
    """

    def __init__(
        self,
        layout: KvLayout,
        num_blocks: int,
        generations: NDArray[np.uint64],
        listener: CacheListener | None = None,
        *,
        overbook: float = 1.0,
    ) -> None:
        """`generations`: uint64 [num_blocks]. At most `overbook` x num_blocks blocks are promised to
        newcomers."""
        self.layout = layout
        self._blocks = Blocks(num_blocks, generations)
        self._cache = PrefixCache(listener)
        self._tables: dict[OwnerId, _Table] = {}
        self._quarantine: dict[OwnerId, _Table] = {}
        self._promises = Promises(num_blocks * overbook)
        self._lock = threading.Lock()
        self._gained = False
        self._free_listeners: tuple[Callable[[], None], ...] = ()

    # What there is

    def counts(self) -> PoolCounts:
        with self._lock:
            states = {state.value: self._blocks.count(state) for state in BlockState}
            return PoolCounts(total=self._blocks.total, promised=self._promises.total, **states)

    def available(self) -> int:
        """Blocks that `allocate` or `reserve` could deliver now: free and cached."""
        with self._lock:
            return self._available()

    def table(self, owner: OwnerId) -> tuple[BlockId, ...]:
        """The owner's blocks in order; empty for an unknown owner."""
        with self._lock:
            return tuple(self._tables.get(owner, ()))

    def owners(self) -> tuple[OwnerId, ...]:
        """Everybody with blocks, with a promise, or with blocks in quarantine."""
        with self._lock:
            return tuple({*self._tables, *self._promises.owners(), *self._quarantine})

    def generation(self, block: BlockId) -> int:
        """What a reader must find, before and after its copy, for the bytes to be this content."""
        with self._lock:
            return self._blocks.generation(block)

    def add_free_listener(self, listener: Callable[[], None]) -> None:
        """Call `listener` after blocks became available or promises shrank, in the thread that did it.

        The pool's lock is not held, so it may call the pool; it must not block.
        """
        with self._lock:
            self._free_listeners = (*self._free_listeners, listener)

    # Promises

    def promise(self, owner: OwnerId, blocks: int) -> bool:
        """Add `blocks` to the owner's promise; False, and no change, beyond total x overbook."""
        with self._lock:
            return self._promises.add(owner, blocks)

    def raise_promise(self, owner: OwnerId, blocks: int) -> None:
        """The owner's promise is at least `blocks` from now on, also beyond total x overbook.

        For what is owed already, as to a preempted sequence: `promise` refuses until the excess is gone.
        """
        with self._lock:
            self._promises.raise_to(owner, blocks)

    def promised(self, owner: OwnerId) -> int:
        """Blocks promised to the owner; 0 where there is no promise."""
        with self._lock:
            return self._promises.of(owner)

    def unpromise(self, owner: OwnerId) -> None:
        """Take the owner's whole promise back. Idempotent."""
        with self._gaining():
            self._gained = self._promises.drop(owner) > 0

    # Content by name

    def match(self, names: Sequence[BlockName]) -> int:
        """How many leading `names` are here, in use or cached."""
        with self._lock:
            return sum(1 for _ in self._cache.leading(names))

    def acquire_prefix(self, owner: OwnerId, names: Sequence[BlockName]) -> tuple[BlockId, ...]:
        """Append the longest leading run of `names` that is here to the owner's table, held."""
        with self._lock:
            found = tuple(self._cache.leading(names))
            self._refer_all(owner, found, "acquire")
            return found

    def name(self, owner: OwnerId, block: BlockId, name: BlockName) -> None:
        """The content of a full held block is final; it can be found by `name` from now on.

        Where another block has that name already, this one stays unnamed and is freed when released.
        """
        with self._lock:
            self._require(owner, (block,), BlockState.HELD, "name")
            current = self._cache.name_of(block)
            if current is not None and current != name:
                raise PoolError(
                    f"{owner} names block {block} {name.hex()}, but it is {current.hex()} for good"
                )
            if self._cache.find(name) is None:
                self._cache.store(block, name)

    def names(self) -> tuple[BlockName, ...]:
        """All names that can be found now, parents before children."""
        with self._lock:
            return self._cache.names()

    def clear_cache(self) -> None:
        """Discard all content that nobody has."""
        with self._lock:
            self._evict(self._blocks.count(BlockState.CACHED))

    # Taking blocks

    def allocate(self, owner: OwnerId, n: int) -> tuple[BlockId, ...] | None:
        """Append `n` fresh blocks, held, evicting cached ones as needed; all or (None) nothing."""
        return self._take(owner, n, BlockState.HELD)

    def reserve(self, owner: OwnerId, n: int) -> tuple[BlockId, ...] | None:
        """As `allocate`, for a transfer to fill: reserved until `commit`."""
        return self._take(owner, n, BlockState.RESERVED)

    def acquire(
        self, owner: OwnerId, names: Sequence[BlockName], blocks: int, *, reserve: bool = False
    ) -> int | None:
        """`blocks` in all: the longest leading run of `names` that is here, and fresh ones behind it.

        Returns how many are reused. None where there is no room: then nothing has changed, and nobody is told
        of a gain. Reused blocks are held; fresh ones too, or reserved.
        """
        state = BlockState.RESERVED if reserve else BlockState.HELD
        with self._lock:
            found = tuple(self._cache.leading(names[:blocks]))
            fresh = blocks - len(found)
            parked = sum(1 for block in found if self._blocks.state(block) is BlockState.CACHED)
            if fresh > self._available() - parked:
                return None
            self._refer_all(owner, found, "acquire")
            self._take_fresh(owner, fresh, state)
            return len(found)

    def pin(self, reader: OwnerId, blocks: Sequence[BlockId]) -> None:
        """Append `blocks` (held or cached) to a reader's table: they live until the reader releases them too.

        Blocks that the reader has already stay as they are. Pin a chain from its first block, so that its
        blocks leave the cache children first.
        """
        with self._lock:
            held = self._tables.get(reader, {})
            self._refer_all(reader, tuple(block for block in blocks if block not in held), "pin")

    def fork(self, source: OwnerId, target: OwnerId, shared: int, fresh: int) -> tuple[BlockId, ...] | None:
        """Append the first `shared` blocks of the source's table to the target's, and `fresh` held ones.

        Returns the fresh blocks; None where there is no room, and nothing has changed. Shared blocks are full
        and final; what is still to be written is copied to a fresh block before the source goes on.
        """
        with self._lock:
            table = tuple(self._tables.get(source, ()))
            if not 0 <= shared <= len(table) or fresh < 0:
                raise PoolError(
                    f"{target} cannot fork {shared} blocks of {source}, which has {len(table)}, "
                    f"with {fresh} of its own"
                )
            self._require(source, table[:shared], BlockState.HELD, "share")
            if fresh > self._available():
                return None
            self._refer_all(target, table[:shared], "fork")
            return self._take_fresh(target, fresh, BlockState.HELD)

    # Filling reserved blocks

    def start_loading(self, owner: OwnerId, blocks: Sequence[BlockId]) -> None:
        """A transfer may write these reserved blocks from now on."""
        self._move_all(owner, blocks, BlockState.RESERVED, BlockState.LOADING, "start loading")

    def landed(self, owner: OwnerId, blocks: Sequence[BlockId]) -> None:
        """The transfer reported, well or not: nobody writes these loading blocks any more."""
        self._move_all(owner, blocks, BlockState.LOADING, BlockState.RESERVED, "land")

    def commit(self, owner: OwnerId) -> None:
        """All reserved blocks of the owner are content now: held."""
        with self._lock:
            table = self._tables.get(owner, {})
            loading = [block for block in table if self._blocks.state(block) is BlockState.LOADING]
            if loading:
                raise PoolError(f"{owner} cannot commit: a transfer may still write blocks {loading}")
            for block in table:
                if self._blocks.state(block) is BlockState.RESERVED:
                    self._blocks.move(block, BlockState.HELD)

    # Giving blocks back

    def release(self, owner: OwnerId) -> None:
        """Drop the owner's references, tail first; its promise stays. Idempotent.

        The last reference gone, a named block is cached and any other one free. A loading block is
        quarantined under the owner until `drain`.
        """
        with self._gaining():
            for block in reversed(self._tables.pop(owner, {})):
                self._drop(owner, block)

    def drain(self, owner: OwnerId) -> None:
        """The owner's dead transfer can write no more: its quarantined blocks are free. Idempotent."""
        with self._gaining():
            for block in self._quarantine.pop(owner, {}):
                self._blocks.discard(block)
                self._gained = True

    # Checks

    def check_integrity(self) -> None:
        """Raise IntegrityError unless all books agree: states, references, free list, names, promises."""
        with self._lock:
            self._blocks.check_integrity()
            references: dict[BlockId, int] = {}
            for table in self._tables.values():
                for block in table:
                    references[block] = references.get(block, 0) + 1
            for index in range(self._blocks.total):
                block = BlockId(index)
                counted, listed = self._blocks.references(block), references.get(block, 0)
                if counted != listed:
                    raise IntegrityError(
                        f"block {block} counts {counted} references and is in {listed} tables"
                    )
            held = self._blocks.in_state(BlockState.HELD)
            filling = self._blocks.in_state(BlockState.RESERVED) | self._blocks.in_state(BlockState.LOADING)
            if references.keys() != held | filling:
                raise IntegrityError(
                    f"owned states and tables differ in {references.keys() ^ (held | filling)}"
                )
            if shared := [block for block in filling if references[block] != 1]:
                raise IntegrityError(f"blocks {shared} are being filled and have more than one owner")
            quarantined = [block for table in self._quarantine.values() for block in table]
            if sorted(quarantined) != sorted(self._blocks.in_state(BlockState.QUARANTINED)):
                raise IntegrityError(f"quarantine lists {sorted(quarantined)}, the states say otherwise")
            self._cache.check_integrity(self._blocks.in_state(BlockState.CACHED), held)
            self._promises.check_integrity()

    # Inside the lock

    @contextmanager
    def _gaining(self) -> Iterator[None]:
        """Hold the lock, then tell the free listeners if something was gained."""
        with self._lock:
            self._gained = False
            yield
            listeners = self._free_listeners if self._gained else ()
        for listener in listeners:
            listener()

    def _available(self) -> int:
        return self._blocks.count(BlockState.FREE) + self._blocks.count(BlockState.CACHED)

    def _take(self, owner: OwnerId, n: int, state: BlockState) -> tuple[BlockId, ...] | None:
        if n < 0:
            raise PoolError(f"{owner} asked for {n} blocks; ask for 0 or more")
        with self._lock:
            return None if n > self._available() else self._take_fresh(owner, n, state)

    def _take_fresh(self, owner: OwnerId, n: int, state: BlockState) -> tuple[BlockId, ...]:
        self._evict(max(0, n - self._blocks.count(BlockState.FREE)))
        taken = tuple(self._blocks.take(state) for _ in range(n))
        if taken:
            self._tables.setdefault(owner, {}).update(dict.fromkeys(taken))
        return taken

    def _evict(self, count: int) -> None:
        for block in self._cache.evict(count):
            self._blocks.discard(block)

    def _refer_all(self, owner: OwnerId, blocks: Sequence[BlockId], verb: str) -> None:
        table = self._tables.get(owner, {})
        if len(set(blocks)) != len(blocks) or not table.keys().isdisjoint(blocks):
            raise PoolError(
                f"{owner} cannot {verb} {list(blocks)}: one of them twice, its table is {list(table)}"
            )
        for block in blocks:
            state = self._blocks.state(block)
            if state not in (BlockState.HELD, BlockState.CACHED):
                raise PoolError(f"{owner} cannot {verb} block {block}: it is {state}, not held or cached")
        for block in blocks:
            if self._blocks.state(block) is BlockState.CACHED:
                self._cache.unpark(block)
                self._blocks.move(block, BlockState.HELD)
            self._blocks.refer(block)
        if blocks:
            self._tables.setdefault(owner, {}).update(dict.fromkeys(blocks))

    def _require(self, owner: OwnerId, blocks: Sequence[BlockId], state: BlockState, verb: str) -> None:
        table = self._tables.get(owner, {})
        for block in blocks:
            actual = self._blocks.state(block)
            if block not in table:
                raise PoolError(f"{owner} cannot {verb} block {block} ({actual}): its table is {list(table)}")
            if actual is not state:
                raise PoolError(f"{owner} cannot {verb} block {block}: it is {actual}, not {state}")

    def _move_all(
        self, owner: OwnerId, blocks: Sequence[BlockId], before: BlockState, after: BlockState, verb: str
    ) -> None:
        with self._lock:
            unique = tuple(dict.fromkeys(blocks))
            self._require(owner, unique, before, verb)
            for block in unique:
                self._blocks.move(block, after)

    def _drop(self, owner: OwnerId, block: BlockId) -> None:
        if self._blocks.unrefer(block):
            return
        if self._blocks.state(block) is BlockState.LOADING:
            self._blocks.move(block, BlockState.QUARANTINED)
            self._quarantine.setdefault(owner, {})[block] = None
            return
        self._gained = True
        if self._cache.name_of(block) is None:
            self._blocks.discard(block)
        else:
            self._blocks.move(block, BlockState.CACHED)
            self._cache.park(block)
