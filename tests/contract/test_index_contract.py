"""What every LocationIndex and every Membership does, whatever keeps the data."""

import asyncio
import secrets
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pdserve.cluster.redis_server import RedisServer, start_redis
from pdserve.core.clock import ManualClock
from pdserve.core.types import BlockName, Incarnation, Role, WorkerId
from pdserve.core.worker_record import WorkerLoad, WorkerRecord
from pdserve.kvtransfer.index.base import LOCATE_LIMIT, Holder, Holding, Location, LocationIndex, Update
from pdserve.kvtransfer.index.link import RedisLink
from pdserve.kvtransfer.index.membership import Membership, Standing
from pdserve.kvtransfer.index.memory import MemoryIndex
from pdserve.kvtransfer.index.memory_membership import MemoryMembership
from pdserve.kvtransfer.index.metered import MeteredIndex
from pdserve.kvtransfer.index.redis_index import RedisIndex
from pdserve.kvtransfer.index.redis_membership import RedisMembership
from pdserve.kvtransfer.names import chain

A = Holder(WorkerId("prefill-0"), Incarnation("a1"))
A_AGAIN = Holder(A.worker, Incarnation("a2"))
B = Holder(WorkerId("decode-0"), Incarnation("b1"))
BF16 = "bfloat16/tp1"
CALM_S = 5.0
"""Time-out of calls that should simply work on a busy machine."""


@dataclass(frozen=True)
class Cluster:
    """One implementation of both contracts over the same data."""

    index: LocationIndex
    membership: Membership


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    server = start_redis()
    yield server
    server.stop()


@pytest.fixture(params=["memory", "redis", "metered"])
async def cluster(request: pytest.FixtureRequest) -> AsyncIterator[Cluster]:
    if request.param == "redis":
        server: RedisServer = request.getfixturevalue("redis_server")
        link = RedisLink(server.url, f"contract-{secrets.token_hex(4)}")
        yield Cluster(RedisIndex(link, CALM_S, CALM_S), RedisMembership(link, ttl_s=60.0, timeout_s=CALM_S))
        await link.close()
        return
    memory = MemoryIndex()
    membership = MemoryMembership(memory, ManualClock(), ttl_s=60.0)
    yield Cluster(MeteredIndex(memory) if request.param == "metered" else memory, membership)


@pytest.fixture
def index(cluster: Cluster) -> LocationIndex:
    return cluster.index


@pytest.fixture
def membership(cluster: Cluster) -> Membership:
    return cluster.membership


def names(blocks: int, root: bytes = b"root") -> tuple[BlockName, ...]:
    return chain(root, [1] * 16 * blocks)


async def add(
    index: LocationIndex, holder: Holder, seq: int, new: Sequence[BlockName], representation: str = BF16
) -> Update:
    return await index.add(holder.worker, holder.incarnation, seq, new, representation)


async def remove(index: LocationIndex, holder: Holder, seq: int, gone: Sequence[BlockName]) -> Update:
    return await index.remove(holder.worker, holder.incarnation, seq, gone)


async def depths(index: LocationIndex, asked: Sequence[BlockName], *holders: Holder) -> dict[str, int]:
    return {worker: where.depth for worker, where in (await index.locate(asked, holders)).items()}


def record(holder: Holder) -> WorkerRecord:
    return WorkerRecord(
        worker=holder.worker,
        incarnation=holder.incarnation,
        role=Role.PREFILL,
        model="tiny",
        schema="00" * 16,
        endpoint="127.0.0.1:4000",
        pid=42,
        context_tokens=2048,
        vocab_size=512,
        dtype="float32",
        pool_blocks=64,
        role_weight=1.0,
    )


class TestLocate:
    async def test_depth_is_the_number_of_leading_blocks(self, index: LocationIndex) -> None:
        asked = names(10)
        await add(index, A, 1, asked[:7])
        for length in range(1, 11):
            assert await depths(index, asked[:length], A) == {A.worker: min(length, 7)}

    async def test_says_tier_and_representation_of_the_holder(self, index: LocationIndex) -> None:
        await add(index, A, 1, names(2), "float32/tp2")
        found = await index.locate(names(2), [A])
        assert found == {A.worker: Location(depth=2, representation="float32/tp2", tier="device")}

    async def test_several_workers_are_answered_in_one_call(self, index: LocationIndex) -> None:
        asked = names(9)
        await add(index, A, 1, asked[:3])
        await add(index, B, 1, asked[:8], "int8")
        found = await index.locate(asked, [A, B])
        assert found == {A.worker: Location(3, BF16), B.worker: Location(8, "int8")}

    async def test_only_the_asked_holders_are_in_the_answer(self, index: LocationIndex) -> None:
        await add(index, A, 1, names(3))
        await add(index, B, 1, names(3))
        assert await depths(index, names(3), B) == {B.worker: 3}

    async def test_a_holder_without_the_first_block_is_absent(self, index: LocationIndex) -> None:
        await add(index, A, 1, names(3, b"other"))
        assert await depths(index, names(3), A, B) == {}

    @pytest.mark.parametrize("holders", [[], [A]])
    async def test_nothing_asked_is_nothing_found(self, index: LocationIndex, holders: list[Holder]) -> None:
        await add(index, A, 1, names(1))
        assert await index.locate([], holders) == {}
        assert await index.locate(names(1), []) == {}

    async def test_stops_in_front_of_a_hole(self, index: LocationIndex) -> None:
        asked = names(40)
        await add(index, A, 1, asked)
        await remove(index, A, 2, [asked[20]])
        depth = (await depths(index, asked, A))[A.worker]
        assert depth in (20, 40)  # 40 blocks are two runs: the end of either is an allowed hint
        assert await depths(index, asked[:21], A) == {A.worker: 20}

    async def test_a_chain_that_forks_counts_only_the_common_part(self, index: LocationIndex) -> None:
        held = chain(b"root", [1] * 64)
        asked = chain(b"root", [1] * 32 + [2] * 32)
        await add(index, A, 1, held)
        assert await depths(index, asked, A) == {A.worker: 2}

    @pytest.mark.parametrize("held", [0, 1, 1023, 1024, 1999, 2000])
    async def test_two_thousand_blocks_are_located_exactly(self, index: LocationIndex, held: int) -> None:
        asked = names(2000)
        await add(index, A, 1, asked[:held])
        assert await depths(index, asked, A) == ({A.worker: held} if held else {})

    async def test_depth_is_capped(self, index: LocationIndex) -> None:
        asked = names(LOCATE_LIMIT + 5)
        await add(index, A, 1, asked)
        assert await depths(index, asked, A) == {A.worker: LOCATE_LIMIT}


class TestUpdates:
    async def test_removed_names_are_gone_and_others_stay(self, index: LocationIndex) -> None:
        asked = names(6)
        await add(index, A, 1, asked)
        assert await remove(index, A, 2, asked[:3:-1]) is Update.APPLIED
        assert await depths(index, asked, A) == {A.worker: 4}

    async def test_a_holder_without_names_keeps_its_sequence(self, index: LocationIndex) -> None:
        await add(index, A, 1, names(2))
        await remove(index, A, 2, names(2)[::-1])
        assert await depths(index, names(2), A) == {}
        assert await add(index, A, 3, names(1)) is Update.APPLIED

    async def test_a_skipped_number_is_a_gap_and_changes_nothing(self, index: LocationIndex) -> None:
        await add(index, A, 1, names(1))
        assert await add(index, A, 3, names(4)) is Update.GAP
        assert await remove(index, A, 3, names(1)) is Update.GAP
        assert await depths(index, names(4), A) == {A.worker: 1}
        assert await add(index, A, 2, names(4)) is Update.APPLIED

    @pytest.mark.parametrize("seq", [2, 7])
    async def test_an_unknown_holder_must_begin_with_one(self, index: LocationIndex, seq: int) -> None:
        assert await add(index, A, seq, names(1)) is Update.GAP
        assert await index.dump() == {}

    async def test_an_unknown_holder_cannot_begin_by_removing(self, index: LocationIndex) -> None:
        assert await remove(index, A, 1, names(1)) is Update.GAP
        assert await index.dump() == {}

    async def test_a_used_number_is_stale_and_changes_nothing(self, index: LocationIndex) -> None:
        await add(index, A, 1, names(2))
        await remove(index, A, 2, names(2)[::-1])
        assert await add(index, A, 1, names(2)) is Update.STALE
        assert await index.replace(A.worker, A.incarnation, 2, names(2), BF16) is Update.STALE
        assert await depths(index, names(2), A) == {}

    async def test_no_names_only_check_the_number(self, index: LocationIndex) -> None:
        assert await add(index, A, 1, ()) is Update.APPLIED
        assert await add(index, A, 2, ()) is Update.APPLIED
        await index.drop(A.worker, A.incarnation)
        assert await add(index, A, 3, ()) is Update.GAP

    async def test_another_representation_is_a_gap(self, index: LocationIndex) -> None:
        await add(index, A, 1, names(1))
        assert await add(index, A, 2, names(2), "int8") is Update.GAP
        assert await index.replace(A.worker, A.incarnation, 3, names(2), "int8") is Update.APPLIED
        assert await index.locate(names(2), [A]) == {A.worker: Location(2, "int8")}

    async def test_replace_forgets_what_was_there(self, index: LocationIndex) -> None:
        await add(index, A, 1, names(5))
        other = names(3, b"other")
        assert await index.replace(A.worker, A.incarnation, 9, other, BF16) is Update.APPLIED
        assert await depths(index, names(5), A) == {}
        assert await depths(index, other, A) == {A.worker: 3}
        assert await add(index, A, 10, names(5)) is Update.APPLIED

    async def test_replace_by_nothing_leaves_nothing(self, index: LocationIndex) -> None:
        await add(index, A, 1, names(5))
        await index.replace(A.worker, A.incarnation, 2, (), BF16)
        assert (await index.dump())[A] == Holding(2, BF16, frozenset())

    async def test_incarnations_share_nothing(self, index: LocationIndex) -> None:
        await add(index, A, 1, names(4))
        assert await depths(index, names(4), A_AGAIN) == {}
        assert await add(index, A_AGAIN, 1, names(1)) is Update.APPLIED
        assert await depths(index, names(4), A_AGAIN) == {A.worker: 1}
        assert await depths(index, names(4), A) == {A.worker: 4}

    async def test_drop_forgets_one_incarnation(self, index: LocationIndex) -> None:
        for holder in (A, A_AGAIN, B):
            await add(index, holder, 1, names(2))
        await index.drop(A.worker, A.incarnation)
        await index.drop(A.worker, A.incarnation)
        assert set(await index.dump()) == {A_AGAIN, B}
        assert await depths(index, names(2), A) == {}
        assert await add(index, A, 2, names(2)) is Update.GAP

    async def test_dump_is_everything(self, index: LocationIndex) -> None:
        many = names(3000)
        await add(index, A, 1, many)
        await add(index, B, 1, names(2), "int8")
        assert await index.dump() == {
            A: Holding(1, BF16, frozenset(many)),
            B: Holding(1, "int8", frozenset(names(2))),
        }


class TestMembership:
    async def test_announced_workers_are_listed_in_order(self, membership: Membership) -> None:
        load = WorkerLoad(running=3, perf_model={"prefill_a": 0.5})
        for holder in (A, B):
            assert await membership.announce(record(holder), load) is Standing.CURRENT
        members = await membership.members()
        assert [member.record for member in members] == [record(B), record(A)]
        assert [member.load for member in members] == [load, load]
        assert all(0 <= member.age_s < 60 for member in members)

    async def test_a_heartbeat_brings_the_load(self, membership: Membership) -> None:
        await membership.announce(record(A), WorkerLoad())
        load = WorkerLoad(waiting=9)
        assert await membership.heartbeat(A.worker, A.incarnation, load) is Standing.CURRENT
        (member,) = await membership.members()
        assert member.load == load

    async def test_announcing_again_replaces_the_record(self, membership: Membership) -> None:
        await membership.announce(record(A), WorkerLoad())
        draining = replace(record(A), draining=True)
        assert await membership.announce(draining, WorkerLoad()) is Standing.CURRENT
        (member,) = await membership.members()
        assert member.record == draining

    async def test_a_heartbeat_of_nobody_is_unknown(self, membership: Membership) -> None:
        assert await membership.heartbeat(A.worker, A.incarnation, WorkerLoad()) is Standing.UNKNOWN
        assert await membership.members() == ()

    async def test_a_new_incarnation_fences_the_old_one(self, membership: Membership) -> None:
        await membership.announce(record(A), WorkerLoad())
        assert await membership.announce(record(A_AGAIN), WorkerLoad()) is Standing.CURRENT
        assert await membership.heartbeat(A.worker, A.incarnation, WorkerLoad()) is Standing.FENCED
        assert await membership.announce(record(A), WorkerLoad()) is Standing.FENCED
        (member,) = await membership.members()
        assert member.record == record(A_AGAIN)

    async def test_a_new_incarnation_drops_the_blocks_of_the_old_one(self, cluster: Cluster) -> None:
        index, membership = cluster.index, cluster.membership
        await membership.announce(record(A), WorkerLoad())
        for holder in (A, A_AGAIN, B):
            await add(index, holder, 1, names(2))
        await membership.announce(record(A_AGAIN), WorkerLoad())
        assert set(await index.dump()) == {A_AGAIN, B}

    async def test_announcing_again_keeps_the_blocks(self, cluster: Cluster) -> None:
        await cluster.membership.announce(record(A), WorkerLoad())
        await add(cluster.index, A, 1, names(2))
        await cluster.membership.announce(record(A), WorkerLoad())
        assert await depths(cluster.index, names(2), A) == {A.worker: 2}

    async def test_a_withdrawn_worker_is_gone_with_its_blocks(self, cluster: Cluster) -> None:
        index, membership = cluster.index, cluster.membership
        await membership.announce(record(A), WorkerLoad())
        await add(index, A, 1, names(2))
        for _ in range(2):
            await membership.withdraw(A.worker, A.incarnation)
        assert await membership.members() == ()
        assert await index.dump() == {}
        assert await membership.heartbeat(A.worker, A.incarnation, WorkerLoad()) is Standing.FENCED

    async def test_a_late_withdrawal_leaves_the_next_incarnation_alone(self, cluster: Cluster) -> None:
        index, membership = cluster.index, cluster.membership
        await membership.announce(record(A), WorkerLoad())
        await membership.announce(record(A_AGAIN), WorkerLoad())
        await add(index, A_AGAIN, 1, names(2))
        await membership.withdraw(A.worker, A.incarnation)
        assert [member.record for member in await membership.members()] == [record(A_AGAIN)]
        assert set(await index.dump()) == {A_AGAIN}

    async def test_the_sweep_takes_ghosts_and_leaves_members(self, cluster: Cluster) -> None:
        index, membership = cluster.index, cluster.membership
        await membership.announce(record(A), WorkerLoad())
        ghosts = [Holder(WorkerId(f"ghost-{at}"), Incarnation("x")) for at in range(5)]
        for holder in (A, A_AGAIN, *ghosts):
            await add(index, holder, 1, names(1))
        assert await membership.sweep(limit=100) == 6
        assert set(await index.dump()) == {A}
        assert await membership.sweep(limit=100) == 0

    async def test_the_sweep_is_bounded(self, cluster: Cluster) -> None:
        for at in range(5):
            await add(cluster.index, Holder(WorkerId(f"ghost-{at}"), Incarnation("x")), 1, names(1))
        assert await cluster.membership.sweep(limit=2) == 2
        assert len(await cluster.index.dump()) == 3

    async def test_the_run_id_is_stable(self, membership: Membership) -> None:
        first, second = await membership.listing(), await membership.listing()
        assert first.run_id == second.run_id != ""


STORED = [chain(b"root", [fork] * 16 * depth + [9] * 16 * 3) for fork in (1, 2) for depth in (1, 3, 6)]
"""Chains that share prefixes, up to 9 blocks."""

change = st.tuples(
    st.sampled_from(["add", "remove", "replace", "drop", "gap", "late"]),
    st.sampled_from([A, A_AGAIN, B]),
    st.sampled_from(STORED),
    st.integers(min_value=0, max_value=9),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(change, max_size=14))
def test_redis_and_memory_never_differ(redis_server: RedisServer, changes: list[tuple]) -> None:
    asyncio.run(compare(redis_server.url, changes))


async def compare(url: str, changes: list[tuple]) -> None:
    """Play prefix-closed changes on both, and compare every answer and the end."""
    link = RedisLink(url, f"property-{secrets.token_hex(6)}")
    memory, redis = MemoryIndex(), RedisIndex(link, CALM_S, CALM_S)
    seqs = dict.fromkeys((A, A_AGAIN, B), 0)
    try:
        for kind, holder, path, cut in changes:
            seq = seqs[holder] + {"gap": 2, "late": 0}.get(kind, 1)
            answers = [await play(one, kind, holder, seq, path, cut) for one in (memory, redis)]
            assert answers[0] == answers[1]
            if kind == "drop":
                seqs[holder] = 0
            elif answers[0] is Update.APPLIED:
                seqs[holder] = seq
            for asked in STORED:
                holders = list(seqs)
                assert await memory.locate(asked, holders) == await redis.locate(asked, holders)
        assert await memory.dump() == await redis.dump()
    finally:
        await link.close()


async def play(
    index: LocationIndex, kind: str, holder: Holder, seq: int, path: Sequence[BlockName], cut: int
) -> Update | None:
    if kind == "drop":
        await index.drop(holder.worker, holder.incarnation)
        return None
    if kind == "replace":
        return await index.replace(holder.worker, holder.incarnation, seq, path[:cut], BF16)
    if kind == "remove":  # a subtree: the rest of every known chain through path[cut]
        through = [other for other in STORED if path[cut : cut + 1] == other[cut : cut + 1]]
        return await remove(index, holder, seq, sorted({name for other in through for name in other[cut:]}))
    return await add(index, holder, seq, path[:cut])
