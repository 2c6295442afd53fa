"""What the pool promises to its callers, one property at a time."""

import threading
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from pdserve.core.types import BlockId, BlockName, OwnerId
from pdserve.kvtransfer.pool.errors import IntegrityError, PoolError
from pdserve.kvtransfer.pool.layout import KvLayout
from pdserve.kvtransfer.pool.pool import KvPool

LAYOUT = KvLayout(1, 1, 1, "float32")
A, B, READER = OwnerId("a"), OwnerId("b"), OwnerId("reader")


class Log:
    def __init__(self) -> None:
        self.stored_names: list[BlockName] = []
        self.removed_names: list[BlockName] = []

    def stored(self, names: Sequence[BlockName]) -> None:
        self.stored_names += names

    def removed(self, names: Sequence[BlockName]) -> None:
        self.removed_names += names


def pool_of(total: int, listener: Log | None = None, overbook: float = 1.0) -> KvPool:
    return KvPool(LAYOUT, total, np.zeros(total, np.uint64), listener, overbook=overbook)


def names(chain: str, count: int) -> list[BlockName]:
    return [BlockName(f"{chain}{depth:02}".encode().ljust(16)) for depth in range(count)]


def taken(blocks: tuple[BlockId, ...] | None) -> tuple[BlockId, ...]:
    assert blocks is not None
    return blocks


def cache(pool: KvPool, chain: Sequence[BlockName]) -> None:
    """Compute `chain` and let go of it."""
    owner = OwnerId("writer")
    for block, name in zip(taken(pool.allocate(owner, len(chain))), chain, strict=True):
        pool.name(owner, block, name)
    pool.release(owner)


def test_children_are_evicted_before_their_parents_and_old_chains_before_new_ones() -> None:
    log = Log()
    pool = pool_of(6, log)
    old, new = names("old", 3), names("new", 3)
    cache(pool, old)
    cache(pool, new)
    assert taken(pool.allocate(A, 4))
    assert log.removed_names == [*reversed(old), new[2]]
    assert pool.match(new) == 2
    pool.check_integrity()


def test_a_chain_in_use_again_is_evicted_last() -> None:
    log = Log()
    pool = pool_of(4, log)
    first, second = names("1-", 2), names("2-", 2)
    cache(pool, first)
    cache(pool, second)
    assert len(pool.acquire_prefix(A, first)) == 2
    pool.release(A)
    taken(pool.allocate(B, 2))
    assert log.removed_names == [*reversed(second)]
    pool.check_integrity()


def test_a_prefix_is_shared_not_copied() -> None:
    pool = pool_of(4)
    chain = names("c", 3)
    cache(pool, chain)
    first, second = pool.acquire_prefix(A, chain), pool.acquire_prefix(B, [*chain[:2], *names("x", 1)])
    assert second == first[:2]
    pool.release(A)
    assert (pool.counts().held, pool.counts().cached) == (2, 1)
    pool.release(B)
    assert pool.counts().cached == 3
    pool.check_integrity()


def test_a_second_block_of_the_same_content_stays_unnamed_and_is_freed() -> None:
    log = Log()
    pool = pool_of(3, log)
    (name,) = names("n", 1)
    for owner in (A, B):
        pool.name(owner, taken(pool.allocate(owner, 1))[0], name)
    assert log.stored_names == [name]
    pool.release(B)
    assert (pool.counts().held, pool.counts().cached, pool.counts().free) == (1, 0, 2)
    pool.check_integrity()


def test_a_pin_keeps_blocks_alive_after_their_owner_released_them() -> None:
    pool = pool_of(2)
    blocks = taken(pool.allocate(A, 2))
    generations = [pool.generation(block) for block in blocks]
    pool.pin(READER, blocks)
    pool.release(A)
    assert pool.available() == 0
    assert pool.allocate(B, 1) is None
    assert [pool.generation(block) for block in blocks] == generations
    pool.release(READER)
    assert pool.available() == 2
    assert all(pool.generation(block) > before for block, before in zip(blocks, generations, strict=True))
    pool.check_integrity()


def test_cached_content_keeps_its_generation_until_it_is_evicted() -> None:
    pool = pool_of(1)
    (name,) = names("n", 1)
    cache(pool, [name])
    before = pool.generation(BlockId(0))
    (block,) = pool.acquire_prefix(A, [name])
    assert pool.generation(block) == before
    pool.release(A)
    taken(pool.reserve(B, 1))
    assert pool.generation(block) > before
    assert pool.match([name]) == 0
    pool.check_integrity()


def test_a_generation_changes_before_the_block_is_handed_out() -> None:
    generations = np.zeros(1, np.uint64)
    pool = KvPool(LAYOUT, 1, generations)
    seen = int(generations[0])
    for _ in range(3):
        (block,) = taken(pool.allocate(A, 1))
        assert pool.generation(block) == int(generations[0]) > seen
        seen = int(generations[0])
        pool.release(A)
        assert int(generations[0]) > seen


def test_blocks_of_a_dead_transfer_are_nobodys_until_drained() -> None:
    pool = pool_of(4)
    blocks = taken(pool.reserve(A, 4))
    pool.start_loading(A, blocks[:2])
    pool.release(A)
    pool.release(A)
    assert (pool.counts().quarantined, pool.counts().free) == (2, 2)
    assert pool.table(A) == ()
    assert pool.owners() == (A,)
    assert not set(taken(pool.allocate(B, 2))) & set(blocks[:2])
    pool.drain(A)
    pool.drain(A)
    assert pool.counts().quarantined == 0
    assert pool.owners() == (B,)
    pool.check_integrity()


def test_a_handoff_commits_what_no_transfer_may_write_any_more() -> None:
    pool = pool_of(4)
    handoff = OwnerId("handoff")
    assert pool.promise(handoff, 3)
    blocks = taken(pool.reserve(handoff, 2))
    pool.start_loading(handoff, blocks)
    with pytest.raises(PoolError, match="may still write"):
        pool.commit(handoff)
    pool.landed(handoff, blocks)
    pool.commit(handoff)
    assert pool.table(handoff) == blocks
    assert pool.promised(handoff) == 3
    assert pool.counts().held == 2
    pool.check_integrity()


def test_promises_stop_at_the_overbooked_total_and_survive_a_preemption() -> None:
    pool = pool_of(4, overbook=1.5)
    assert pool.promise(A, 4)
    assert not pool.promise(B, 3)
    assert pool.promise(B, 2)
    assert pool.counts().promised == 6
    taken(pool.allocate(A, 4))
    pool.release(A)
    assert pool.promised(A) == 4
    pool.unpromise(A)
    pool.unpromise(A)
    assert pool.promise(B, 4)
    pool.check_integrity()


def test_what_is_owed_may_pass_the_limit_and_then_nobody_new_is_promised() -> None:
    pool = pool_of(4)
    assert pool.promise(A, 2)
    assert pool.promise(B, 2)
    pool.raise_promise(A, 1)  # covered already
    assert pool.promised(A) == 2
    pool.raise_promise(A, 4)
    assert (pool.promised(A), pool.counts().promised) == (4, 6)
    pool.check_integrity()
    assert not pool.promise(READER, 1)
    pool.unpromise(B)
    assert not pool.promise(READER, 1)
    pool.unpromise(A)
    assert pool.counts().promised == 0
    assert pool.promise(READER, 4)
    pool.check_integrity()


def test_listeners_hear_of_gains_only_and_may_call_the_pool() -> None:
    pool = pool_of(2)
    heard: list[int] = []
    pool.add_free_listener(lambda: heard.append(pool.available()))
    blocks = taken(pool.allocate(A, 2))
    pool.pin(READER, blocks)
    pool.release(A)
    assert heard == []
    pool.release(READER)
    assert heard == [2]
    pool.release(READER)
    pool.unpromise(A)
    assert heard == [2]
    pool.promise(A, 1)
    pool.unpromise(A)
    assert heard == [2, 2]


def test_names_lists_everything_findable_parents_first() -> None:
    pool = pool_of(3)
    chain = names("c", 3)
    cache(pool, chain)
    assert pool.names() == tuple(chain)


@pytest.mark.parametrize(
    ("story", "act"),
    [
        ("block 9 does not exist", lambda pool: pool.generation(BlockId(9))),
        ("a asked for -1 blocks", lambda pool: pool.allocate(A, -1)),
        ("a asked for a promise of -1", lambda pool: pool.promise(A, -1)),
        ("a cannot start loading block 0: it is held", lambda pool: pool.start_loading(A, [BlockId(0)])),
        ("b cannot land block 0 .held.: its table", lambda pool: pool.landed(B, [BlockId(0)])),
        ("b cannot name block 0", lambda pool: pool.name(B, BlockId(0), names("n", 1)[0])),
        ("a names block 0 .* but it is", lambda pool: pool.name(A, BlockId(0), names("other", 1)[0])),
        ("reader cannot pin block 3: it is free", lambda pool: pool.pin(READER, [BlockId(3)])),
        (
            "reader cannot pin block 2: it is reserved",
            lambda pool: pool.pin(READER, [BlockId(0), BlockId(2)]),
        ),
        ("a cannot acquire .*twice", lambda pool: pool.acquire_prefix(A, names("n", 1))),
    ],
)
def test_an_illegal_move_tells_its_story_and_changes_nothing(
    story: str, act: Callable[[KvPool], object]
) -> None:
    pool = pool_of(4)
    blocks = taken(pool.allocate(A, 2))
    pool.name(A, blocks[0], names("n", 1)[0])
    taken(pool.reserve(B, 1))
    before = (pool.counts(), pool.table(A), pool.table(B), pool.owners())
    with pytest.raises(PoolError, match=story):
        act(pool)
    assert (pool.counts(), pool.table(A), pool.table(B), pool.owners()) == before
    pool.check_integrity()


def test_generations_of_the_wrong_shape_are_refused() -> None:
    with pytest.raises(PoolError, match="uint64"):
        KvPool(LAYOUT, 4, np.zeros(3, np.uint64))


def test_integrity_notices_a_generation_that_somebody_else_wrote() -> None:
    generations = np.zeros(2, np.uint64)
    pool = KvPool(LAYOUT, 2, generations)
    pool.check_integrity()
    generations[1] += np.uint64(1)
    with pytest.raises(IntegrityError, match="block 1 is free"):
        pool.check_integrity()


def test_two_threads_never_share_a_fresh_block() -> None:
    pool = pool_of(8)
    start = threading.Barrier(2)
    failures: list[BaseException] = []

    def work(owner: OwnerId) -> None:
        try:
            start.wait()
            for _ in range(300):
                if pool.allocate(owner, 5) is not None:
                    assert pool.counts().held == 5
                    pool.release(owner)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(owner,)) for owner in (A, B)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    pool.check_integrity()
    assert pool.counts().free == 8


def test_an_acquire_takes_the_prefix_that_is_here_and_fresh_blocks_behind_it() -> None:
    pool = pool_of(4)
    chain = names("c", 2)
    cache(pool, chain)
    assert pool.acquire(A, [*chain, *names("x", 1)], 4, reserve=True) == 2
    assert len(pool.table(A)) == 4
    counts = pool.counts()
    assert (counts.held, counts.reserved, counts.free, counts.cached) == (2, 2, 0, 0)
    pool.check_integrity()


def test_an_acquire_without_room_changes_nothing_and_tells_nobody() -> None:
    log = Log()
    pool = pool_of(4, log)
    chain = names("c", 2)
    cache(pool, chain)
    taken(pool.allocate(B, 1))
    heard: list[int] = []
    pool.add_free_listener(lambda: heard.append(1))
    before = pool.counts()
    # One block is free. The two cached ones are the prefix itself: they are no room for what follows it.
    assert pool.acquire(A, chain, 4) is None
    assert pool.counts() == before
    assert (heard, log.removed_names, pool.table(A)) == ([], [], ())
    assert pool.acquire(A, chain, 3) == 2
    pool.check_integrity()


def test_a_fork_shares_what_is_full_and_takes_the_rest_for_itself() -> None:
    pool = pool_of(8)
    chain = names("c", 3)
    for block, name in zip(taken(pool.allocate(A, 4)), chain, strict=False):
        pool.name(A, block, name)
    generations = [pool.generation(block) for block in pool.table(A)]
    (fresh,) = taken(pool.fork(A, B, 3, 1))
    assert pool.table(B) == (*pool.table(A)[:3], fresh)
    assert fresh not in pool.table(A)
    assert pool.counts().held == 5
    pool.release(A)
    assert pool.counts().held == 4  # B keeps what it shared
    assert [pool.generation(block) for block in pool.table(B)[:3]] == generations[:3]
    pool.check_integrity()
    pool.release(B)
    assert (pool.counts().cached, pool.counts().free) == (3, 5)
    pool.check_integrity()


def test_a_fork_without_room_or_of_what_is_not_there_changes_nothing() -> None:
    pool = pool_of(4)
    taken(pool.allocate(A, 4))
    assert pool.fork(A, B, 3, 1) is None
    for shared, fresh in ((5, 0), (-1, 0), (1, -1)):
        with pytest.raises(PoolError, match="cannot fork"):
            pool.fork(A, B, shared, fresh)
    assert pool.owners() == (A,)
    pool.release(A)
    taken(pool.reserve(A, 2))
    with pytest.raises(PoolError, match="cannot share block"):
        pool.fork(A, B, 1, 1)
    assert pool.owners() == (A,)
    pool.check_integrity()
