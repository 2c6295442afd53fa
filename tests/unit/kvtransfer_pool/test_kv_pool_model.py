"""Any sequence of pool operations agrees with a naive model that keeps lists and recounts everything."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pdserve.core.types import BlockId, BlockName, OwnerId
from pdserve.kvtransfer.pool.errors import PoolError
from pdserve.kvtransfer.pool.layout import KvLayout
from pdserve.kvtransfer.pool.pool import KvPool

T = TypeVar("T")

TOTAL = 10
OVERBOOK = 1.5
OWNERS = [OwnerId(f"o{n}") for n in range(4)]
CHAINS = [[BlockName(bytes([chain, depth]) * 8) for depth in range(TOTAL)] for chain in range(2)]
LAYOUT = KvLayout(1, 1, 1, "float32")

owner_ids = st.sampled_from(OWNERS)
small = st.integers(0, 5)


class Events:
    """What the listener believes is stored."""

    def __init__(self) -> None:
        self.names: set[BlockName] = set()
        self.removals: list[BlockName] = []

    def stored(self, names: Sequence[BlockName]) -> None:
        assert not self.names & set(names), "stored twice"
        self.names |= set(names)

    def removed(self, names: Sequence[BlockName]) -> None:
        assert set(names) <= self.names, "removed, never stored"
        self.names -= set(names)
        self.removals += names


class PoolMachine(RuleBasedStateMachine):
    """The model: a state and a name per block, a list per owner, a list for eviction order."""

    def __init__(self) -> None:
        super().__init__()
        self.events = Events()
        self.generations = np.zeros(TOTAL, np.uint64)
        self.pool = KvPool(LAYOUT, TOTAL, self.generations, self.events, overbook=OVERBOOK)
        self.woken = 0
        self.pool.add_free_listener(self.wake)
        self.states = ["free"] * TOTAL
        self.names: dict[BlockId, BlockName] = {}
        self.tables: dict[OwnerId, list[BlockId]] = {owner: [] for owner in OWNERS}
        self.quarantine: dict[OwnerId, set[BlockId]] = {owner: set() for owner in OWNERS}
        self.promises = dict.fromkeys(OWNERS, 0)
        self.evictable: list[BlockId] = []
        self.removals: list[BlockName] = []
        self.last_generations = self.generations.copy()

    def wake(self) -> None:
        self.woken += 1
        self.pool.counts()  # the lock is free: this would dead-lock otherwise

    # The model's own moves

    def evict(self, count: int) -> None:
        for _ in range(count):
            block = self.evictable.pop(0)
            self.removals.append(self.names.pop(block))
            self.states[block] = "free"

    def drop(self, owner: OwnerId, block: BlockId) -> bool:
        """True where the block became available."""
        self.tables[owner].remove(block)
        if any(block in table for table in self.tables.values()):
            return False
        if self.states[block] == "loading":
            self.states[block] = "quarantined"
            self.quarantine[owner].add(block)
            return False
        if block in self.names:
            self.states[block] = "cached"
            self.evictable.append(block)
        else:
            self.states[block] = "free"
        return True

    def hold(self, owner: OwnerId, blocks: Sequence[BlockId]) -> None:
        for block in blocks:
            if self.states[block] == "cached":
                self.evictable.remove(block)
                self.states[block] = "held"
            self.tables[owner].append(block)

    def take(self, owner: OwnerId, n: int, taken: tuple[BlockId, ...] | None, state: str) -> None:
        available = self.states.count("free") + self.states.count("cached")
        assert (taken is None) == (n > available)
        if taken is None:
            return
        assert len(set(taken)) == n
        self.evict(max(0, n - self.states.count("free")))
        for block in taken:
            assert self.states[block] == "free"
            assert self.generations[block] > self.last_generations[block]
            self.states[block] = state
        self.tables[owner] += taken

    # Rules: one per operation

    @rule(owner=owner_ids, n=small)
    def allocate(self, owner: OwnerId, n: int) -> None:
        self.take(owner, n, self.pool.allocate(owner, n), "held")

    @rule(owner=owner_ids, n=small)
    def reserve(self, owner: OwnerId, n: int) -> None:
        self.take(owner, n, self.pool.reserve(owner, n), "reserved")

    @rule(owner=owner_ids, data=st.data(), verb=st.sampled_from(["start_loading", "landed"]))
    def fill(self, owner: OwnerId, data: st.DataObject, verb: str) -> None:
        before, after = ("reserved", "loading") if verb == "start_loading" else ("loading", "reserved")
        blocks = data.draw(
            st.lists(st.sampled_from([BlockId(b) for b in range(TOTAL)]), max_size=3, unique=True)
        )
        legal = all(block in self.tables[owner] and self.states[block] == before for block in blocks)
        self.expect(legal, lambda: getattr(self.pool, verb)(owner, blocks))
        if legal:
            for block in blocks:
                self.states[block] = after

    @rule(owner=owner_ids)
    def load_all(self, owner: OwnerId) -> None:
        blocks = [block for block in self.tables[owner] if self.states[block] == "reserved"]
        self.pool.start_loading(owner, blocks)
        for block in blocks:
            self.states[block] = "loading"

    @rule(owner=owner_ids)
    def land_all(self, owner: OwnerId) -> None:
        blocks = [block for block in self.tables[owner] if self.states[block] == "loading"]
        self.pool.landed(owner, blocks)
        for block in blocks:
            self.states[block] = "reserved"

    @rule(owner=owner_ids)
    def commit(self, owner: OwnerId) -> None:
        legal = all(self.states[block] != "loading" for block in self.tables[owner])
        self.expect(legal, lambda: self.pool.commit(owner))
        if legal:
            for block in self.tables[owner]:
                self.states[block] = "held"

    @rule(owner=owner_ids, chain=st.sampled_from(CHAINS))
    def name_all(self, owner: OwnerId, chain: list[BlockName]) -> None:
        for index, block in enumerate(self.tables[owner]):
            if self.states[block] == "held" and block not in self.names:
                self.pool.name(owner, block, chain[index])
                if chain[index] not in self.names.values():
                    self.names[block] = chain[index]

    @precondition(lambda self: any(not table for table in self.tables.values()))
    @rule(chain=st.sampled_from(CHAINS), n=st.integers(1, 4))
    def cache_chain(self, chain: list[BlockName], n: int) -> None:
        """What a sequence does from its start to its end."""
        owner = next(owner for owner in OWNERS if not self.tables[owner])
        self.acquire_run(owner, chain[:n])
        self.allocate(owner, n - len(self.tables[owner]))
        self.name_all(owner, chain)
        self.release(owner)

    @rule(owner=owner_ids, block=st.integers(0, TOTAL - 1), chain=st.sampled_from(CHAINS), depth=small)
    def name_any(self, owner: OwnerId, block: BlockId, chain: list[BlockName], depth: int) -> None:
        mine = block in self.tables[owner] and self.states[block] == "held"
        legal = mine and self.names.get(block, chain[depth]) == chain[depth]
        self.expect(legal, lambda: self.pool.name(owner, block, chain[depth]))
        if legal and chain[depth] not in self.names.values():
            self.names[block] = chain[depth]

    @rule(owner=owner_ids, chain=st.sampled_from(CHAINS), n=small)
    def acquire(self, owner: OwnerId, chain: list[BlockName], n: int) -> None:
        self.acquire_run(owner, chain[:n])

    def acquire_run(self, owner: OwnerId, chain: list[BlockName]) -> None:
        where = {name: block for block, name in self.names.items()}
        run: list[BlockId] = []
        for name in chain:
            if name not in where:
                break
            run.append(where[name])
        assert self.pool.match(chain) == len(run)
        legal = not set(run) & set(self.tables[owner])
        found = self.expect(legal, lambda: self.pool.acquire_prefix(owner, chain))
        if legal:
            assert found == tuple(run)
            self.hold(owner, run)

    @rule(owner=owner_ids, blocks=st.lists(st.integers(0, TOTAL - 1), max_size=4, unique=True))
    def pin(self, owner: OwnerId, blocks: list[BlockId]) -> None:
        fresh = [block for block in blocks if block not in self.tables[owner]]
        legal = all(self.states[block] in ("held", "cached") for block in fresh)
        self.expect(legal, lambda: self.pool.pin(owner, blocks))
        if legal:
            self.hold(owner, fresh)

    @rule(giver=owner_ids, taker=owner_ids, shared=small, fresh=st.integers(0, 2))
    def fork(self, giver: OwnerId, taker: OwnerId, shared: int, fresh: int) -> None:
        blocks = self.tables[giver][:shared]
        legal = len(blocks) == shared and all(self.states[block] == "held" for block in blocks)
        room = self.states.count("free") + self.states.count("cached")
        # Where there is no room, nobody is told that the tables do not go together either.
        legal = legal and (fresh > room or not set(blocks) & set(self.tables[taker]))
        taken = self.expect(legal, lambda: self.pool.fork(giver, taker, shared, fresh))
        if not legal:
            return
        if taken is not None:
            self.hold(taker, blocks)
        self.take(taker, fresh, taken, "held")

    @rule(owner=owner_ids)
    def release(self, owner: OwnerId) -> None:
        woken = self.woken
        self.pool.release(owner)
        freed = [self.drop(owner, block) for block in reversed(list(self.tables[owner]))]
        assert self.woken == woken + any(freed)

    @rule(owner=owner_ids)
    def drain(self, owner: OwnerId) -> None:
        woken = self.woken
        self.pool.drain(owner)
        assert self.woken == woken + bool(self.quarantine[owner])
        for block in self.quarantine[owner]:
            self.states[block] = "free"
        self.quarantine[owner] = set()

    @rule(owner=owner_ids, blocks=st.integers(0, 12))
    def promise(self, owner: OwnerId, blocks: int) -> None:
        fits = sum(self.promises.values()) + blocks <= TOTAL * OVERBOOK
        assert self.pool.promise(owner, blocks) == fits
        self.promises[owner] += blocks if fits else 0

    @rule(owner=owner_ids, blocks=st.integers(0, 12))
    def raise_promise(self, owner: OwnerId, blocks: int) -> None:
        self.pool.raise_promise(owner, blocks)
        self.promises[owner] = max(self.promises[owner], blocks)

    @rule(owner=owner_ids)
    def unpromise(self, owner: OwnerId) -> None:
        woken = self.woken
        self.pool.unpromise(owner)
        assert self.woken == woken + bool(self.promises[owner])
        self.promises[owner] = 0

    @rule()
    def clear_cache(self) -> None:
        self.pool.clear_cache()
        self.evict(len(self.evictable))

    # Always

    @staticmethod
    def expect(legal: bool, act: Callable[[], T]) -> T | None:
        if legal:
            return act()
        with pytest.raises(PoolError):
            act()
        return None

    @invariant()
    def books_agree(self) -> None:
        self.pool.check_integrity()
        counts = self.pool.counts()
        for state in ("free", "held", "reserved", "cached", "loading", "quarantined"):
            assert getattr(counts, state) == self.states.count(state), state
        assert counts.total == TOTAL
        assert counts.promised == sum(self.promises.values())
        assert self.pool.available() == self.states.count("free") + self.states.count("cached")
        for owner in OWNERS:
            assert self.pool.table(owner) == tuple(self.tables[owner])
            assert self.pool.promised(owner) == self.promises[owner]
        involved = [o for o in OWNERS if self.tables[o] or self.promises[o] or self.quarantine[o]]
        assert set(self.pool.owners()) == set(involved)

    @invariant()
    def listener_knows_what_is_named(self) -> None:
        assert self.events.names == set(self.names.values())
        assert self.events.removals == self.removals

    @invariant()
    def generations_only_grow(self) -> None:
        assert (self.generations >= self.last_generations).all()
        self.last_generations = self.generations.copy()


PoolMachine.TestCase.settings = settings(
    max_examples=100, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
TestPoolAgainstModel = PoolMachine.TestCase
