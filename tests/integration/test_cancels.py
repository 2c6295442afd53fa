"""Cancels at every point of a request's life leave nothing behind on either side."""

import asyncio
import contextlib
import itertools
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stack import Stack, stack, tiny_config

from pdserve.cluster.redis_server import RedisServer
from pdserve.core.config import HandoffConfig
from pdserve.core.errors import PdserveError
from pdserve.core.lifecycle import Lifecycle
from pdserve.core.types import RequestId, Role
from pdserve.kvtransfer.transports.base import Grant
from pdserve.workers.seams import Seams

CANCELS = 200
LEAST = 10
AT = (
    Lifecycle.FIRST_OPEN,
    Lifecycle.CHUNK_READY,
    Lifecycle.RESERVED,
    Lifecycle.CHUNK_LANDED,
    Lifecycle.FILLED_SEEN,
    Lifecycle.VERIFIED,
    Lifecycle.COMMITTED,
    Lifecycle.FIRST_TOKEN,
    Lifecycle.TOKEN,
)
"""FIRST_TOKEN: the first token that D emits; TOKEN: the tenth."""


class CancelAt:
    """Cancels a request at D the moment its chosen event happens, on either worker."""

    def __init__(self) -> None:
        self.plans: dict[str, Lifecycle] = {}
        self.hits: Counter[Lifecycle] = Counter()
        self.stack: Stack | None = None

    def __call__(self, event: Lifecycle, facts: Mapping[str, object]) -> None:
        request = str(facts["request"])
        if event is Lifecycle.TOKEN:
            named = {0: Lifecycle.FIRST_TOKEN, 9: Lifecycle.TOKEN}.get(int(str(facts["index"])))
        else:
            named = event
        if named is not None and self.plans.get(request) is named:
            del self.plans[request]
            self.hits[named] += 1
            assert self.stack is not None
            self.stack.workers["decode-0"].decode.cancel(RequestId(request))


class SlowToConnect:
    """Takes its time for three of four handoffs, so that its blocks are reserved before it can fetch."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self._numbers = itertools.count()

    async def get(self, *arguments: Any) -> Any:
        if next(self._numbers) % 4:
            await asyncio.sleep(0.3)
        return await self._inner.get(*arguments)

    async def drop(self, *peer: Any) -> None:
        await self._inner.drop(*peer)

    async def close(self) -> None:
        await self._inner.close()


async def test_two_hundred_cancels_spread_over_the_states_leave_nothing(
    tiny_model: Path, redis: RedisServer
) -> None:
    observer = CancelAt()
    workers = {"prefill-0": Role.PREFILL, "decode-0": Role.DECODE}
    seams = {name: Seams(observer=observer, importers=SlowToConnect) for name in workers}
    # A small share of P's pool for exports, so that handoffs queue there too.
    config = tiny_config(tiny_model, redis, handoff=HandoffConfig(export_share=0.2))
    async with stack(config, workers, seams=seams) as running:
        observer.stack = running
        client = running.client
        assert client is not None
        gate = asyncio.Semaphore(8)

        async def cancelled(number: int) -> None:
            request = f"cancel-{number}"
            observer.plans[request] = AT[number % len(AT)]
            # Distinct prompts of two to five chunks.
            prompt = f"{number} " * (20 + 15 * (number % 3))
            async with gate:
                try:
                    await client.generate(prompt, max_tokens=40, ignore_eos=True, request_id=request)
                except PdserveError:
                    return
            raise AssertionError(f"{request} was to be cancelled at {AT[number % len(AT)]}, and ended well")

        await asyncio.gather(*(cancelled(number) for number in range(CANCELS)))
        await running.settled()
        decode, prefill = running.workers["decode-0"], running.workers["prefill-0"]
        print("\ncancelled at       count")
        for event in AT:
            print(f"{event:18} {observer.hits[event]:5}")
        for side, counters in (("D", decode.handoffs.counters), ("P", prefill.prefill.counters)):
            for name, count in sorted(counters.items()):
                print(f"{side} {name:32} {count:5}")
        assert all(observer.hits[event] >= LEAST for event in AT), observer.hits
        for state in ("open", "reserved", "fetching", "verified"):
            assert decode.handoffs.counters[f"aborted_in_{state}"] >= LEAST, state
        for state in ("open", "filling", "filled"):
            assert prefill.prefill.counters[f"aborted_in_{state}"] >= LEAST, state
        # What is left works.
        result = await client.generate("and they lived on", max_tokens=5, ignore_eos=True)
        assert len(result.token_ids) == 5


async def test_clients_that_leave_leave_nothing(tiny_model: Path, redis: RedisServer) -> None:
    workers = {"prefill-0": Role.PREFILL, "decode-0": Role.DECODE}
    async with stack(tiny_config(tiny_model, redis), workers) as running:
        client = running.client
        assert client is not None

        async def leave(number: int) -> None:
            prompt = f"{number} blocks on the wall. " * 6
            call = asyncio.create_task(client.generate(prompt, max_tokens=60, ignore_eos=True))
            await asyncio.sleep(0.004 * number)  # anywhere in its life: not a synchronisation
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)

        await asyncio.gather(*(leave(number) for number in range(40)))
        await running.settled()
        status = await client.status()
        assert status.requests_in_flight == 0


class StuckImporter:
    """Its first copy ends only when it is let go, also after a cancel, as one that writes memory must."""

    def __init__(self, inner: Any, stuck: asyncio.Event, release: asyncio.Event) -> None:
        self._inner = inner
        self._stuck = stuck
        self._release = release

    @property
    def transport(self) -> str:
        return str(self._inner.transport)

    async def fetch(self, grant: Grant) -> Any:
        report = await self._inner.fetch(grant)
        if not self._stuck.is_set():
            self._stuck.set()
            while not self._release.is_set():
                with contextlib.suppress(asyncio.CancelledError):
                    await self._release.wait()
        return report

    async def close(self) -> None:
        await self._inner.close()


async def test_a_request_id_asked_again_while_its_first_attempt_drains_gets_its_own_blocks(
    tiny_model: Path, redis: RedisServer
) -> None:
    stuck, release = asyncio.Event(), asyncio.Event()

    class Importers:
        def __init__(self, inner: Any) -> None:
            self._inner = inner

        async def get(self, *arguments: Any) -> Any:
            return StuckImporter(await self._inner.get(*arguments), stuck, release)

        async def drop(self, *peer: Any) -> None:
            await self._inner.drop(*peer)

        async def close(self) -> None:
            await self._inner.close()

    workers = {"prefill-0": Role.PREFILL, "decode-0": Role.DECODE}
    seams = {"decode-0": Seams(importers=Importers)}
    async with stack(tiny_config(tiny_model, redis), workers, seams=seams) as running:
        client = running.client
        assert client is not None
        prompt = "the same request, asked twice. " * 4
        call = asyncio.create_task(client.generate(prompt, max_tokens=8, ignore_eos=True, request_id="twice"))
        async with asyncio.timeout(20):
            await stuck.wait()
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        pool = running.workers["decode-0"].pool
        async with asyncio.timeout(20):
            while not pool.counts().quarantined:
                await asyncio.sleep(0.01)
        again = asyncio.create_task(
            client.generate(prompt, max_tokens=60, ignore_eos=True, request_id="twice")
        )
        async with asyncio.timeout(20):
            while not pool.counts().held:
                await asyncio.sleep(0.01)
        release.set()  # the first attempt drains while the second decodes
        second = await again
        other = await client.generate(prompt, max_tokens=60, ignore_eos=True)
        assert second.token_ids == other.token_ids
        await running.settled()
