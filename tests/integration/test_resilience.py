"""What goes wrong stays small: redis, memory, bytes, peers, engines and malformed requests."""

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any, cast

import grpc
import numpy as np
import pytest
from stack import RouterSeams, Stack, busy, stack, tiny_config

from pdserve.client import AsyncClient
from pdserve.cluster.redis_server import RedisServer, start_redis
from pdserve.core.config import HandoffConfig, ServeConfig, SessionConfig
from pdserve.core.errors import GrpcCode, InvalidRequest, Overloaded, PdserveError, WorkerLost
from pdserve.core.types import BlockId, BlockName, OwnerId, Role, WorkerId
from pdserve.kvtransfer.handoff.filler import Filler, FillEstimate, FillProgress
from pdserve.kvtransfer.index.base import Holder
from pdserve.kvtransfer.index.link import RedisLink
from pdserve.kvtransfer.index.redis_index import RedisIndex
from pdserve.kvtransfer.names import chain, pack_chain, pack_tokens
from pdserve.kvtransfer.transports.base import Failed, Grant, Landed
from pdserve.proto import worker_pb2, worker_pb2_grpc
from pdserve.router.policies.base import Placement, PlacementRequest
from pdserve.router.view import ClusterView
from pdserve.workers.process import FAILED, WorkerHost
from pdserve.workers.seams import Seams
from pdserve.workers.spec import WorkerSpec

PD = {"prefill-0": Role.PREFILL, "decode-0": Role.DECODE}
QUICK = HandoffConfig(heartbeat_s=0.1, silence_s=0.6)
"""A silent peer is given up after little more than half a second."""


UNHURRIED = SessionConfig(reattach_s=60.0)
"""Who waits for a router to come back waits longer than a test does."""


def prompt(number: int, tokens: int = 70) -> str:
    """The tiny model has a token per byte."""
    return f"{number}: {'a cluster that bends and does not break. ' * 40}"[:tokens]


async def completion(client: AsyncClient, text: str, tokens: int = 16) -> tuple[int, ...]:
    result = await client.generate(text, max_tokens=tokens, ignore_eos=True)
    assert len(result.token_ids) == tokens
    return result.token_ids


def engine(config: ServeConfig, **changes: Any) -> ServeConfig:
    return dataclasses.replace(config, engine=dataclasses.replace(config.engine, **changes))


async def until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.01)


async def announced(running: Stack, name: str) -> None:
    """Wait until the index knows exactly what a worker's pool holds, under its present incarnation."""
    worker = running.workers[name]
    link = RedisLink(str(running.config.index.redis_url), running.config.index.cluster)
    try:
        index = RedisIndex(link)
        async with asyncio.timeout(20):
            while True:
                held = (await index.dump()).get(Holder(worker.spec.worker_id, worker.incarnation))
                if held is not None and held.names == set(worker.pool.names()):
                    return
                await asyncio.sleep(0.02)
    finally:
        await link.close()


# -- redis ---------------------------------------------------------------------------------------------


async def test_without_redis_the_ring_serves_and_the_index_comes_back_with_it(tiny_model: Path) -> None:
    server = await asyncio.to_thread(start_redis)
    try:
        config = tiny_config(tiny_model, server)
        config = dataclasses.replace(config, index=dataclasses.replace(config.index, ttl_s=1.0))
        async with stack(config, PD) as running:
            client, view = running.client, running.view
            assert client is not None
            assert view is not None
            expected = [await completion(client, prompt(number)) for number in range(4)]
            before = {name: worker.incarnation for name, worker in running.workers.items()}

            await asyncio.to_thread(server.stop)
            await until(lambda: not view.available)
            await asyncio.sleep(1.5 * config.index.ttl_s)  # expiry counts only while redis answers
            assert [await completion(client, prompt(number)) for number in range(4)] == expected
            await completion(client, prompt(5))
            status = await client.status()
            assert {worker.worker for worker in status.workers} == set(PD)

            await asyncio.to_thread(server.restart)
            await until(lambda: view.available)
            for name in PD:
                await announced(running, name)
            await running.until_ready(list(PD))
            assert await completion(client, prompt(0)) == expected[0]
            after = {name: worker.incarnation for name, worker in running.workers.items()}
            assert after == before, "a redis outage fenced somebody"
    finally:
        await asyncio.to_thread(server.stop)


# -- incarnations --------------------------------------------------------------------------------------


@pytest.mark.parametrize("fenced", list(PD))
async def test_a_fence_fails_what_runs_as_retriable_and_nothing_else(
    tiny_model: Path, redis: RedisServer, fenced: str
) -> None:
    async with stack(tiny_config(tiny_model, redis, session=UNHURRIED), PD) as running:
        client, worker = running.client, running.workers[fenced]
        assert client is not None
        expected = await completion(client, prompt(0))
        stream = await client.generate(prompt(1), max_tokens=400, ignore_eos=True, stream=True)
        assert await stream.read() is not None
        old = worker.incarnation

        await worker.fence("test")

        assert worker.incarnation != old
        if fenced == "decode-0":
            with pytest.raises(WorkerLost) as lost:
                await stream.collect()
            assert lost.value.retriable
            async with asyncio.timeout(20):  # nobody waits for a router to claim what is void
                while busy(worker):
                    await asyncio.sleep(0.01)
        else:
            assert len((await stream.collect()).token_ids) == 400  # its KV is D's since the commit
        await running.settled()
        await running.until_ready(list(PD))
        await announced(running, fenced)
        assert await completion(client, prompt(0)) == expected
        again = await client.generate(prompt(2), max_tokens=4, ignore_eos=True)
        assert worker.incarnation in (again.route.decode_incarnation, again.route.prefill_incarnation)


# -- memory --------------------------------------------------------------------------------------------


class Crossed:
    """Each of two workers decodes what the other one prefills."""

    def __init__(self) -> None:
        self._count = 0

    def place(self, view: ClusterView, request: PlacementRequest, now: float) -> Placement | None:
        owner = WorkerId(f"mixed-{self._count % 2}")
        other = WorkerId(f"mixed-{(self._count + 1) % 2}")
        self._count += 1
        return Placement(owner, (other, owner), request.prompt_tokens, 0.0)


class Both:
    """Holds prefills back until two of them have all their blocks."""

    def __init__(self) -> None:
        self._begun = 0
        self._both = asyncio.Event()

    def around(self, inner: Filler) -> "HeldBack":
        return HeldBack(inner, self)

    async def begun(self) -> None:
        self._begun += 1
        if self._begun == 2:
            self._both.set()
        await self._both.wait()


class HeldBack:
    """One worker's prefills, each of which waits behind its first step."""

    def __init__(self, inner: Filler, both: Both) -> None:
        self.estimate = inner.estimate
        self._inner: Any = inner
        self._both = both

    async def fill(
        self, owner: OwnerId, token_ids: Sequence[int], chain: Sequence[BlockName]
    ) -> AsyncIterator[FillProgress]:
        async with aclosing(self._inner.fill(owner, token_ids, chain)) as steps:
            first = True
            async for step in steps:
                if first:
                    await self._both.begun()
                first = False
                yield step


async def test_two_workers_that_hold_blocks_for_each_other_both_finish(
    tiny_model: Path, redis: RedisServer
) -> None:
    """20 blocks exported and 20 wanted in each pool of 30: neither gets its own before one gives up."""
    workers = {"mixed-0": Role.MIXED, "mixed-1": Role.MIXED}
    config = engine(tiny_config(tiny_model, redis), pool_blocks=30, headroom_tokens=16)
    # A late reader loses its blocks before a silent peer is given up, also where the machine is slow.
    handoff = HandoffConfig(heartbeat_s=0.1, silence_s=2.0, export_share=1.0)
    config = dataclasses.replace(config, handoff=handoff)
    both_fill = Both()
    seams = {name: Seams(filler=both_fill.around) for name in workers}
    router = RouterSeams(policy=lambda policy: Crossed())
    async with stack(config, workers, seams=seams, router=router) as running:
        client = running.client
        assert client is not None
        async with asyncio.timeout(30):
            both = await asyncio.gather(
                *(completion(client, prompt(number, 320), tokens=8) for number in range(2))
            )
        assert both[0] == await completion(client, prompt(0, 320), tokens=8)
        assert sum(w.prefill.counters.get("downgraded", 0) for w in running.workers.values()) > 0


@pytest.mark.parametrize(("small", "role"), [("decode-0", "decode pool"), ("prefill-0", "prefill pool")])
async def test_a_prompt_that_can_never_fit_is_refused_at_once_with_both_numbers(
    tiny_model: Path, redis: RedisServer, small: str, role: str
) -> None:
    config = tiny_config(tiny_model, redis)
    little = dataclasses.replace(config.engine, pool_blocks=12)
    async with stack(config, PD, engines={small: little}) as running:
        client = running.client
        assert client is not None
        async with asyncio.timeout(5):
            with pytest.raises(
                InvalidRequest, match=rf"(330 \+ 16 tokens|needs 2\d blocks).* {role} has 12 blocks"
            ):
                await client.generate(prompt(0, 330), max_tokens=16)
        assert len(await completion(client, prompt(1))) == 16


async def test_a_prompt_above_the_export_share_is_prefilled_by_its_owner(
    tiny_model: Path, redis: RedisServer
) -> None:
    config = dataclasses.replace(tiny_config(tiny_model, redis), handoff=HandoffConfig(export_share=0.1))
    async with stack(config, PD) as running:
        client = running.client
        assert client is not None
        result = await client.generate(prompt(0, 330), max_tokens=4, ignore_eos=True)
        assert result.route.prefill_worker == "decode-0"
        assert result.route.candidates_tried == 0  # the router knows the share, and asks no one in vain


async def test_an_overload_is_refused_with_a_time_to_come_back_and_leaks_nothing(
    tiny_model: Path, redis: RedisServer
) -> None:
    """40 requests of 8 blocks each, against a pool that promises three of them at a time."""
    async with stack(engine(tiny_config(tiny_model, redis), pool_blocks=26), PD) as running:
        client = running.client
        assert client is not None
        answers = await asyncio.gather(
            *(completion(client, prompt(number, 64), tokens=64) for number in range(40)),
            return_exceptions=True,
        )
        refused = [answer for answer in answers if isinstance(answer, Overloaded)]
        served = [answer for answer in answers if isinstance(answer, tuple)]
        assert len(refused) + len(served) == 40, answers
        assert len(served) >= 3
        assert refused
        assert all(error.retry_after_s is not None and error.retry_after_s > 0 for error in refused)
        await running.settled()
        assert (await client.status()).requests_in_flight == 0


async def test_preempted_sequences_give_the_same_tokens(tiny_model: Path, redis: RedisServer) -> None:
    texts = [prompt(number, 40) for number in range(8)]
    async with stack(tiny_config(tiny_model, redis), {"mixed-0": Role.MIXED}) as calm:
        assert calm.client is not None
        expected = [await completion(calm.client, text, tokens=100) for text in texts]
    config = engine(tiny_config(tiny_model, redis), pool_blocks=24, headroom_tokens=16, overbook=2.0)
    async with stack(config, PD) as running:
        client = running.client
        assert client is not None
        got = await asyncio.gather(*(completion(client, text, tokens=100) for text in texts))
        assert running.workers["decode-0"].engine.stats().preemptions > 0
        assert got == expected


# -- bytes ---------------------------------------------------------------------------------------------


class Flipped:
    """An importer, the first of whose copies is not what P digested: a bit is flipped under it."""

    def __init__(self, inner: Any, peer: str, importers: "FlipOnce") -> None:
        self.transport = inner.transport
        self._inner = inner
        self._peer = peer
        self._importers = importers

    async def fetch(self, grant: Grant) -> Landed | Failed:
        if not grant.segments or self._importers.damaged is not None:
            return cast(Landed | Failed, await self._inner.fetch(grant))
        self._importers.damaged = self._peer
        storage = self._importers.storage(self._peer)
        source: BlockId = grant.segments[0].source
        whole = storage.read_blocks([source])
        flipped = whole.copy()
        flipped.reshape(-1)[0] ^= np.uint8(1)
        storage.write_blocks([source], flipped)
        try:
            return cast(Landed | Failed, await self._inner.fetch(grant))
        finally:
            storage.write_blocks([source], whole)

    async def close(self) -> None:
        await self._inner.close()


class FlipOnce:
    """Importers, the first of whose copies is damaged."""

    def __init__(self, inner: Any, storage: Callable[[str], Any]) -> None:
        """`storage` gives a worker's."""
        self._inner = inner
        self.storage = storage
        self.damaged: str | None = None

    async def get(self, worker: WorkerId, *rest: Any) -> Flipped | None:
        found = await self._inner.get(worker, *rest)
        return None if found is None else Flipped(found, worker, self)

    async def drop(self, *peer: Any) -> None:
        await self._inner.drop(*peer)

    async def close(self) -> None:
        await self._inner.close()


async def test_a_damaged_byte_is_counted_and_the_next_candidate_serves(
    tiny_model: Path, redis: RedisServer
) -> None:
    async with stack(tiny_config(tiny_model, redis), {"mixed-0": Role.MIXED}) as calm:
        assert calm.client is not None
        expected = await completion(calm.client, prompt(0))
    made: list[FlipOnce] = []

    def flip(inner: Any) -> FlipOnce:
        made.append(FlipOnce(inner, lambda worker: running.workers[worker].storage))
        return made[0]

    workers = {**PD, "prefill-1": Role.PREFILL}
    seams = {"decode-0": Seams(importers=flip)}
    async with stack(tiny_config(tiny_model, redis), workers, seams=seams) as running:
        client = running.client
        assert client is not None
        result = await client.generate(prompt(0), max_tokens=16, ignore_eos=True)
        assert result.token_ids == expected
        assert made[0].damaged is not None
        assert {made[0].damaged, result.route.prefill_worker} == {"prefill-0", "prefill-1"}
        assert result.route.candidates_tried == 1
        counters = (await running.workers["decode-0"].inspect()).counters
        assert counters["fetch_digest_mismatches"] == 1
        assert counters["decode_not_served_corrupt"] == 1


# -- peers ---------------------------------------------------------------------------------------------


class Hanging:
    """A prefill that is accepted and never gets on."""

    def __init__(self, inner: Any) -> None:
        self.begun = 0

    def estimate(self, new_tokens: int, cached_tokens: int) -> FillEstimate:
        return FillEstimate(seconds=0.01, queue_position=0)

    async def fill(
        self, owner: OwnerId, token_ids: Sequence[int], chain: Sequence[BlockName]
    ) -> AsyncIterator[FillProgress]:
        self.begun += 1
        await asyncio.Event().wait()
        yield FillProgress(0)


async def test_a_prefill_worker_that_hangs_is_given_up_and_the_owner_serves(
    tiny_model: Path, redis: RedisServer
) -> None:
    config = dataclasses.replace(tiny_config(tiny_model, redis), handoff=QUICK)
    async with stack(config, PD, seams={"prefill-0": Seams(filler=Hanging)}) as running:
        client = running.client
        assert client is not None
        async with asyncio.timeout(10):
            result = await client.generate(prompt(0), max_tokens=8, ignore_eos=True)
        assert result.route.prefill_worker == "decode-0"
        assert result.route.candidates_tried == 1
        assert running.workers["decode-0"].handoffs.counters["silent_peers"] == 1


async def test_a_drained_prefill_worker_gives_up_what_outlives_its_grace(
    tiny_model: Path, redis: RedisServer
) -> None:
    hanging: list[Hanging] = []

    def hang(inner: Any) -> Hanging:
        hanging.append(Hanging(inner))
        return hanging[0]

    config = tiny_config(tiny_model, redis, handoff=HandoffConfig(silence_s=60.0))
    async with stack(config, PD, seams={"prefill-0": Seams(filler=hang)}) as running:
        client = running.client
        assert client is not None
        call = asyncio.create_task(client.generate(prompt(0), max_tokens=8, ignore_eos=True))
        await until(lambda: hanging[0].begun == 1)
        prefill = running.workers["prefill-0"]
        async with asyncio.timeout(20):  # and not only after the reader's patience
            assert await prefill.drain(0.1) == 0
            assert prefill.prefill.in_flight() == 0
            assert (await call).route.prefill_worker == "decode-0"


async def test_a_worker_that_stops_says_so_to_its_streams(tiny_model: Path, redis: RedisServer) -> None:
    """Before their router has waited in vain for it to come back."""
    config = tiny_config(tiny_model, redis, session=UNHURRIED)
    async with stack(config, {**PD, "decode-1": Role.DECODE}) as running:
        client = running.client
        assert client is not None
        streams = [
            await client.generate(prompt(number), max_tokens=500, ignore_eos=True, stream=True)
            for number in range(6)
        ]
        for stream in streams:
            assert await stream.read() is not None
        async with asyncio.timeout(20):
            await running.remove_worker("decode-0")
            lost = [s for s in streams if s.partial.route.decode_worker == "decode-0"]
            assert lost
            for stream in lost:
                with pytest.raises(WorkerLost, match="is stopping"):
                    await stream.collect()
        for stream in streams:
            if stream not in lost:
                assert len((await stream.collect()).token_ids) == 500


# -- engines -------------------------------------------------------------------------------------------


class Fatal(BaseException):
    """Not an Exception: it ends the engine, and not just the batch."""


class Breakable:
    """A runner that ends its engine once it is told to."""

    def __init__(self) -> None:
        self.broken = False
        self._inner: Any = None

    def around(self, inner: Any) -> "Breakable":
        self._inner = inner
        return self

    def run(self, batch: Any) -> Sequence[int]:
        if self.broken:
            raise Fatal("the device is gone")
        tokens: Sequence[int] = self._inner.run(batch)
        return tokens


async def test_a_dead_engine_fails_every_request_and_the_worker_says_so(
    tiny_model: Path, redis: RedisServer
) -> None:
    runner = Breakable()
    seams = {"mixed-0": Seams(runner=runner.around)}
    async with stack(tiny_config(tiny_model, redis), {"mixed-0": Role.MIXED}, seams=seams) as running:
        client, worker = running.client, running.workers["mixed-0"]
        assert client is not None
        streams = [
            await client.generate(prompt(number), max_tokens=400, ignore_eos=True, stream=True)
            for number in range(3)
        ]
        for stream in streams:
            assert await stream.read() is not None
        runner.broken = True
        async with asyncio.timeout(10):
            error = await worker.failed()
            ends = await asyncio.gather(*(s.collect() for s in streams), return_exceptions=True)
        assert "the device is gone" in error.message
        assert all(isinstance(end, PdserveError) for end in ends), ends
        await until(lambda: not busy(worker))
        worker.pool.check_integrity()
        with pytest.raises(PdserveError):
            await client.generate(prompt(9), max_tokens=4, timeout=5)
        await running.remove_worker("mixed-0")


async def test_the_process_of_a_dead_engine_ends(tiny_model: Path, redis: RedisServer) -> None:
    config = tiny_config(tiny_model, redis)
    spec = WorkerSpec(
        worker="mixed-0", role="mixed", model=str(tiny_model), engine=config.engine, index=config.index
    )
    runner = Breakable()
    statuses: list[int] = []
    host = WorkerHost(spec, Seams(runner=runner.around), end_process=statuses.append)
    record = await host.start()
    runner.broken = True
    async with grpc.aio.insecure_channel(record.endpoint) as channel:
        call = worker_pb2_grpc.WorkerStub(channel).Session()
        await call.write(worker_pb2.SessionRequest(open=open_request("r", range(20))))
        await until(lambda: bool(statuses))
        call.cancel()
    await host.stop()
    assert statuses == [FAILED]


# -- malformed requests --------------------------------------------------------------------------------


ROOT = b"n" * 16


def open_request(name: str, tokens: Sequence[int], **changes: Any) -> worker_pb2.OpenRequest:
    message = worker_pb2.OpenRequest(
        request_id=name,
        prompt_token_ids=pack_tokens(tokens),
        chain=pack_chain(chain(ROOT, list(tokens))),
        namespace=ROOT,
        candidates=[worker_pb2.Candidate(worker="mixed-0")],
    )
    message.sampling.max_tokens = 4
    message.sampling.ignore_eos = True
    for field, value in changes.items():
        if field in ("max_tokens", "temperature", "top_p"):
            setattr(message.sampling, field, value)
        else:
            setattr(message, field, value)
    return message


MALFORMED = [
    open_request("odd chain", range(40), chain=b"x" * 33),
    open_request("short chain", range(40), chain=b"x" * 16),
    open_request("long chain", range(40), chain=b"x" * 64),
    open_request("odd tokens", range(40), prompt_token_ids=b"123"),
    open_request("no tokens", ()),
    open_request("no room to sample", range(40), max_tokens=0),
    open_request("not a number", range(40), temperature=float("nan")),
    open_request("no mass", range(40), top_p=0.0),
    open_request("not a word", [257] * 20),
    open_request("endless", range(40), remaining_s=float("inf")),
    open_request("", range(40)),
]
TOO_LONG = [
    open_request("pool", range(200), max_tokens=1800),
    open_request("context", [1] * 40, max_tokens=2048),
]


async def test_a_malformed_open_is_answered_and_harms_nobody_on_its_session(
    tiny_model: Path, redis: RedisServer
) -> None:
    config = engine(tiny_config(tiny_model, redis), pool_blocks=100)
    async with stack(config, {"mixed-0": Role.MIXED}) as running:
        worker = running.workers["mixed-0"]
        failures: dict[str, worker_pb2.Failure] = {}
        async with grpc.aio.insecure_channel(worker.record().endpoint) as channel:
            call = worker_pb2_grpc.WorkerStub(channel).Session()
            good = open_request("good", range(40), max_tokens=60)
            opens = [good, *MALFORMED, *TOO_LONG, open_request("last", range(40))]
            for message in opens:
                await call.write(worker_pb2.SessionRequest(open=message))
            ended: dict[str, str] = {}
            async with asyncio.timeout(20):
                while len(ended) + len(failures) < len(opens):
                    response = await call.read()
                    assert not response.HasField("replace"), response
                    for item in response.frame.items:
                        if item.HasField("failure"):
                            failures[item.request_id] = item.failure
                        elif item.finish_reason:
                            ended[item.request_id] = item.finish_reason
            for name in ended:
                ack = worker_pb2.AckRequest(request_id=name)
                await call.write(worker_pb2.SessionRequest(ack=ack))
            await until(lambda: not busy(worker))
            call.cancel()
        assert ended == {"good": "length", "last": "length"}
        assert {failure.code for failure in failures.values()} == {int(GrpcCode.INVALID_ARGUMENT)}
        assert not any(failure.retriable for failure in failures.values())
        assert "125 KV blocks" in failures["pool"].message
        assert "has 100" in failures["pool"].message
        assert "2048" in failures["context"].message
