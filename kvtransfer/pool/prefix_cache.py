"""Which block holds which named content, and in what order unowned content is given up. KvPool locks."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Protocol

from pdserve.core.types import BlockId, BlockName
from pdserve.kvtransfer.pool.errors import IntegrityError


class CacheListener(Protocol):
    """Told of every change of what a pool can be asked for by name, in the order of the changes.

    Called with the pool's lock held: only append to a queue. Of blocks that one owner released together,
    children are removed before their parents.
    """

    def stored(self, names: Sequence[BlockName]) -> None: ...

    def removed(self, names: Sequence[BlockName]) -> None: ...


class PrefixCache:
    """Names and the blocks that hold them, one to one; of those, the unowned ones in eviction order."""

    def __init__(self, listener: CacheListener | None) -> None:
        self._listener = listener
        self._blocks: dict[BlockName, BlockId] = {}
        self._names: dict[BlockId, BlockName] = {}
        self._evictable: OrderedDict[BlockId, None] = OrderedDict()

    def name_of(self, block: BlockId) -> BlockName | None:
        return self._names.get(block)

    def find(self, name: BlockName) -> BlockId | None:
        return self._blocks.get(name)

    def leading(self, names: Sequence[BlockName]) -> Iterator[BlockId]:
        """Blocks of `names` up to the first that is missing."""
        for name in names:
            block = self._blocks.get(name)
            if block is None:
                return
            yield block

    def store(self, block: BlockId, name: BlockName) -> None:
        """`block` becomes findable. The caller has checked that both are unnamed."""
        self._blocks[name] = block
        self._names[block] = name
        if self._listener is not None:
            self._listener.stored((name,))

    def park(self, block: BlockId) -> None:
        """Nobody's any more: last in line to be evicted."""
        self._evictable[block] = None

    def unpark(self, block: BlockId) -> None:
        """Somebody's again."""
        del self._evictable[block]

    def evict(self, count: int) -> list[BlockId]:
        """Forget the `count` names unowned for longest; their blocks are the caller's to discard."""
        evicted: list[BlockId] = []
        names: list[BlockName] = []
        for _ in range(count):
            block, _unused = self._evictable.popitem(last=False)
            name = self._names.pop(block)
            del self._blocks[name]
            evicted.append(block)
            names.append(name)
        if names and self._listener is not None:
            self._listener.removed(tuple(names))
        return evicted

    def names(self) -> tuple[BlockName, ...]:
        """Oldest name first: a parent is always older than its children."""
        return tuple(self._blocks)

    def check_integrity(self, cached: set[BlockId], held: set[BlockId]) -> None:
        """Names are one to one; parked = cached; every named block is held or cached."""
        if {block: name for name, block in self._blocks.items()} != self._names:
            raise IntegrityError("the maps name -> block and block -> name are not each other's inverse")
        if set(self._evictable) != cached:
            raise IntegrityError(f"eviction order and cached state differ in {set(self._evictable) ^ cached}")
        if not cached <= self._names.keys():
            raise IntegrityError(f"cached without a name: {cached - self._names.keys()}")
        if stray := self._names.keys() - cached - held:
            raise IntegrityError(f"named but neither held nor cached: {stray}")
