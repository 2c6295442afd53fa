"""Who waits for blocks is asked again when they are there, whoever freed them."""

import asyncio

import numpy as np

from pdserve.core.types import OwnerId
from pdserve.kvtransfer.handoff.events import MemoryFreed
from pdserve.kvtransfer.handoff.reservations import Reservations
from pdserve.kvtransfer.pool.layout import KvLayout
from pdserve.kvtransfer.pool.pool import KvPool


class Handoff:
    def __init__(self) -> None:
        self.asked = asyncio.Event()

    def feed(self, event: object) -> None:
        assert isinstance(event, MemoryFreed)
        self.asked.set()


async def test_blocks_freed_between_the_refusal_and_the_queue_are_not_missed() -> None:
    pool = KvPool(KvLayout(1, 1, 1, "float32"), 2, np.zeros(2, np.uint64))
    reservations = Reservations(pool)
    handoff = Handoff()
    reservations.expect(handoff, 2)
    assert pool.allocate(OwnerId("other"), 1) is not None
    assert pool.acquire(OwnerId("mine"), [], 2, reserve=True) is None
    pool.release(OwnerId("other"))  # by another thread, in the moment before the queue is joined
    reservations.wait(handoff, 2)
    async with asyncio.timeout(5):
        await handoff.asked.wait()
    reservations.leave(handoff)
    reservations.check_idle()


async def test_a_handoff_leaves_the_blocks_that_a_preempted_sequence_waits_for() -> None:
    pool = KvPool(KvLayout(1, 1, 1, "float32"), 4, np.zeros(4, np.uint64))
    owed = 3
    reservations = Reservations(pool, preempted=lambda: owed)
    handoff = Handoff()
    reservations.expect(handoff, 2)
    assert not reservations.may_try(handoff), "4 blocks are there, 3 of them somebody else's"
    owed = 2
    assert reservations.may_try(handoff)
    owed = 3
    assert not reservations.may_try(handoff)
    owed = 0
    reservations.press()  # a heartbeat: the debt was paid, and no block came free that would have told
    async with asyncio.timeout(5):
        await handoff.asked.wait()
    assert reservations.may_try(handoff)
    reservations.leave(handoff)
    reservations.check_idle()
