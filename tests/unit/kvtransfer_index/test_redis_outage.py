"""Redis may vanish: nothing hangs, nothing is believed that is not so, everything comes back."""

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import pytest
from redis import Redis

from pdserve.cluster.redis_server import RedisServer
from pdserve.core.errors import ConfigError
from pdserve.core.types import Incarnation, Role, WorkerId
from pdserve.core.worker_record import WorkerLoad, WorkerRecord
from pdserve.kvtransfer.index.announcer import AnnouncerLimits, CacheAnnouncer
from pdserve.kvtransfer.index.base import Holder, IndexUnavailable, Update
from pdserve.kvtransfer.index.link import RedisLink, Script
from pdserve.kvtransfer.index.membership import Standing
from pdserve.kvtransfer.index.membership_view import MembershipView
from pdserve.kvtransfer.index.redis_index import RedisIndex
from pdserve.kvtransfer.index.redis_membership import RedisMembership
from pdserve.kvtransfer.names import chain

HOLDER = Holder(WorkerId("prefill-0"), Incarnation("a1"))
NAMES = chain(b"root", [1] * 16 * 20)
CALM_S = 5.0
FOREVER_S = 30.0
"""Bound of a test's wait for something that must come."""

RECORD = WorkerRecord(
    worker=HOLDER.worker,
    incarnation=HOLDER.incarnation,
    role=Role.PREFILL,
    model="tiny",
    schema="00",
    endpoint="127.0.0.1:1",
    pid=1,
    context_tokens=128,
    vocab_size=16,
    dtype="float32",
    pool_blocks=8,
    role_weight=1.0,
)


class Witness(RedisIndex):
    """Tells a test what became of the announcer's calls, one after the other."""

    def __init__(self, link: RedisLink) -> None:
        super().__init__(link, CALM_S, CALM_S)
        self._outcomes: asyncio.Queue[tuple[str, Update | None]] = asyncio.Queue()

    async def add(self, *arguments: Any) -> Update:
        return await self._seen("add", super().add(*arguments))

    async def replace(self, *arguments: Any) -> Update:
        return await self._seen("replace", super().replace(*arguments))

    async def saw(self, call: str, outcome: Update | None) -> None:
        """Wait for a call with that outcome (None: unavailable) among those not looked at yet."""
        async with asyncio.timeout(FOREVER_S):
            while await self._outcomes.get() != (call, outcome):
                pass

    async def _seen(self, call: str, work: Coroutine[Any, Any, Update]) -> Update:
        try:
            update = await work
        except IndexUnavailable:
            self._outcomes.put_nowait((call, None))
            raise
        self._outcomes.put_nowait((call, update))
        return update


@pytest.fixture
def index(link: RedisLink) -> Witness:
    return Witness(link)


@pytest.fixture
async def announcer(index: Witness) -> AsyncIterator[CacheAnnouncer]:
    limits = AnnouncerLimits(batch_s=0.005, probe_s=0.02, retry_s=0.01, full_names=len(NAMES))
    announcer = CacheAnnouncer(
        index, HOLDER.worker, HOLDER.incarnation, "float32", lambda: NAMES, limits=limits
    )
    yield announcer
    await announcer.stop()


def kill(server: RedisServer, number: signal.Signals) -> None:
    assert server.pid is not None
    os.kill(server.pid, number)


async def depth(index: RedisIndex) -> int:
    found = await index.locate(NAMES, [HOLDER])
    return found[HOLDER.worker].depth if found else 0


async def test_a_killed_server_is_no_answer(redis_server: RedisServer, link: RedisLink) -> None:
    index = RedisIndex(link, CALM_S, CALM_S)
    await index.add(HOLDER.worker, HOLDER.incarnation, 1, NAMES, "float32")
    redis_server.stop()
    for attempt in (
        index.locate(NAMES, [HOLDER]),
        index.add(HOLDER.worker, HOLDER.incarnation, 2, NAMES, "float32"),
        index.remove(HOLDER.worker, HOLDER.incarnation, 2, NAMES),
        index.replace(HOLDER.worker, HOLDER.incarnation, 2, NAMES, "float32"),
        index.drop(HOLDER.worker, HOLDER.incarnation),
        index.dump(),
    ):
        with pytest.raises(IndexUnavailable, match=r"127\.0\.0\.1"):
            await attempt


async def test_every_membership_call_fails_when_the_server_is_killed(
    redis_server: RedisServer, link: RedisLink
) -> None:
    membership = RedisMembership(link, timeout_s=CALM_S)
    redis_server.stop()
    for attempt in (
        membership.announce(RECORD, WorkerLoad()),
        membership.heartbeat(HOLDER.worker, HOLDER.incarnation, WorkerLoad()),
        membership.withdraw(HOLDER.worker, HOLDER.incarnation),
        membership.listing(),
        membership.members(),
        membership.sweep(),
    ):
        with pytest.raises(IndexUnavailable):
            await attempt


async def test_a_stopped_server_is_no_answer_within_the_time_out(
    redis_server: RedisServer, link: RedisLink
) -> None:
    index = RedisIndex(link, locate_timeout_s=0.05, update_timeout_s=CALM_S)
    await index.add(HOLDER.worker, HOLDER.incarnation, 1, NAMES, "float32")
    kill(redis_server, signal.SIGSTOP)
    try:
        async with asyncio.timeout(FOREVER_S):
            for _ in range(40):  # more than the link has connections: none may stay taken
                with pytest.raises(IndexUnavailable, match=r"0\.05 s"):
                    await index.locate(NAMES, [HOLDER])
    finally:
        kill(redis_server, signal.SIGCONT)
    patient = RedisIndex(link, CALM_S, CALM_S)
    assert await depth(patient) == len(NAMES)


async def test_an_answer_that_came_too_late_is_never_taken_for_the_next_one(
    redis_server: RedisServer, link: RedisLink
) -> None:
    index, hasty = RedisIndex(link, CALM_S, CALM_S), RedisIndex(link, 0.02, CALM_S)
    await index.add(HOLDER.worker, HOLDER.incarnation, 1, NAMES, "float32")
    for length in range(1, 6):
        kill(redis_server, signal.SIGSTOP)
        try:
            with pytest.raises(IndexUnavailable):
                await hasty.locate(NAMES[:length], [HOLDER])
        finally:
            kill(redis_server, signal.SIGCONT)
        assert await depth(index) == len(NAMES)


async def test_a_server_that_accepts_and_says_nothing_is_no_answer() -> None:
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        link = RedisLink(f"redis://127.0.0.1:{mute.getsockname()[1]}/0")
        async with asyncio.timeout(FOREVER_S):
            with pytest.raises(IndexUnavailable, match="no answer"):
                await RedisIndex(link, 0.02).locate(NAMES, [HOLDER])
            await link.close()


async def test_scripts_are_loaded_again_by_a_new_server(redis_server: RedisServer, link: RedisLink) -> None:
    index = RedisIndex(link, CALM_S, CALM_S)
    await index.add(HOLDER.worker, HOLDER.incarnation, 1, NAMES, "float32")
    await asyncio.to_thread(redis_server.restart)
    assert await depth(index) == 0
    await index.add(HOLDER.worker, HOLDER.incarnation, 1, NAMES, "float32")
    assert await depth(index) == len(NAMES)


async def test_an_idle_announcer_tells_a_restarted_server_everything(
    redis_server: RedisServer, index: Witness, announcer: CacheAnnouncer
) -> None:
    announcer.start()
    await index.saw("replace", Update.APPLIED)
    kill(redis_server, signal.SIGKILL)
    await index.saw("replace", None)
    await asyncio.to_thread(redis_server.restart)
    await index.saw("replace", Update.APPLIED)
    assert await depth(index) == len(NAMES)


async def test_an_announcer_notices_lost_data_without_any_failure(
    index: Witness, announcer: CacheAnnouncer
) -> None:
    announcer.start()
    await index.saw("replace", Update.APPLIED)
    await index.drop(HOLDER.worker, HOLDER.incarnation)
    await index.saw("add", Update.GAP)
    await index.saw("replace", Update.APPLIED)
    assert await depth(index) == len(NAMES)


async def test_the_members_stay_through_kill_and_restart(redis_server: RedisServer, link: RedisLink) -> None:
    membership = RedisMembership(link, ttl_s=60.0, timeout_s=CALM_S)
    view = MembershipView(membership, ttl_s=60.0)
    await membership.announce(RECORD, WorkerLoad())
    await view.refresh()
    kill(redis_server, signal.SIGKILL)
    assert not await view.refresh()
    assert [member.record for member in view.current()] == [RECORD]
    await asyncio.to_thread(redis_server.restart)
    assert await view.refresh()
    assert [member.record for member in view.current()] == [RECORD]
    assert await membership.members() == ()
    answer = await membership.heartbeat(HOLDER.worker, HOLDER.incarnation, WorkerLoad())
    assert answer is Standing.UNKNOWN  # an outage alone never fences
    assert await membership.announce(RECORD, WorkerLoad()) is Standing.CURRENT


async def test_a_member_lives_for_its_time_and_a_heartbeat_renews_it(
    redis_server: RedisServer, link: RedisLink
) -> None:
    membership = RedisMembership(link, ttl_s=60.0, timeout_s=CALM_S)
    await membership.announce(RECORD, WorkerLoad())
    key = link.key("member", HOLDER.worker)
    with Redis.from_url(redis_server.url) as client:
        assert 0 < client.pttl(key) <= 60_000
        client.pexpire(key, 20_000)  # as if 40 s had passed
        (member,) = await membership.members()
        assert 40 <= member.age_s < 60
        await membership.heartbeat(HOLDER.worker, HOLDER.incarnation, WorkerLoad())
        assert 20_000 < client.pttl(key) <= 60_000
        client.pexpire(key, 0)
    assert await membership.members() == ()
    answer = await membership.heartbeat(HOLDER.worker, HOLDER.incarnation, WorkerLoad())
    assert answer is Standing.UNKNOWN


async def test_a_member_of_another_version_is_left_out_not_fatal(link: RedisLink) -> None:
    membership = RedisMembership(link, timeout_s=CALM_S)
    await membership.announce(RECORD, WorkerLoad())
    alien = ["decode-9", "z1", '{"worker":"decode-9","colour":"green"}', "{}", 60_000, 60_000]
    await link.run(Script.ANNOUNCE, alien, CALM_S)
    listing = await membership.listing()
    assert [member.record for member in listing.members] == [RECORD]
    assert listing.unreadable == ("decode-9",)


async def test_clusters_on_one_server_do_not_see_each_other(
    redis_server: RedisServer, link: RedisLink
) -> None:
    other = RedisLink(redis_server.url, "other")
    await RedisIndex(link, CALM_S, CALM_S).add(HOLDER.worker, HOLDER.incarnation, 1, NAMES, "float32")
    await RedisMembership(link, timeout_s=CALM_S).announce(RECORD, WorkerLoad())
    assert await RedisIndex(other, CALM_S, CALM_S).dump() == {}
    assert await RedisMembership(other, timeout_s=CALM_S).members() == ()
    await other.close()


async def test_every_key_carries_the_clusters_prefix_and_empties_with_it(
    redis_server: RedisServer, link: RedisLink
) -> None:
    await RedisMembership(link, timeout_s=CALM_S).announce(RECORD, WorkerLoad())
    await RedisIndex(link, CALM_S, CALM_S).add(HOLDER.worker, HOLDER.incarnation, 1, NAMES, "float32")
    with Redis.from_url(redis_server.url, decode_responses=True) as client:
        assert all(key.startswith("pdserve:{unit}:") for key in client.scan_iter())
        await RedisMembership(link, timeout_s=CALM_S).withdraw(HOLDER.worker, HOLDER.incarnation)
        await RedisMembership(link, timeout_s=CALM_S).sweep()
        assert list(client.scan_iter()) == ["pdserve:{unit}:void:prefill-0"]


def test_a_url_that_is_none_is_refused_without_repeating_it() -> None:
    with pytest.raises(ConfigError) as caught:
        RedisLink("http://:secret@localhost")
    assert "secret" not in caught.value.message
