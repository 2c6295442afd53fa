"""A delay in one stage shows in that part of the ledger, and in no other."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from stack import RouterSeams, stack, tiny_config

from pdserve.cluster.redis_server import RedisServer
from pdserve.core.lifecycle import Ledger
from pdserve.core.types import Role, WorkerId
from pdserve.kvtransfer.transports.base import Failed, Grant, Landed
from pdserve.router.policies.base import Placement
from pdserve.workers.engine.runner import BatchSpec
from pdserve.workers.seams import Seams

DELAY_S = 0.05
TRIES = 4
WORKERS = {"prefill-0": Role.PREFILL, "prefill-1": Role.PREFILL, "decode-0": Role.DECODE}


class Wrapped:
    """Passes everything on to the part that it stands in for."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class SlowTokenizer(Wrapped):
    def encode(self, text: str) -> list[int]:
        time.sleep(DELAY_S)
        return list(self._inner.encode(text))


class SlowIndex(Wrapped):
    async def locate(self, names: Any, holders: Any) -> Any:
        await asyncio.sleep(DELAY_S)
        return await self._inner.locate(names, holders)


class OrderedPolicy(Wrapped):
    """Always asks the same prefill workers, in the same order, after a delay."""

    def __init__(self, inner: Any, order: Sequence[str], delay_s: float) -> None:
        super().__init__(inner)
        self._order = tuple(WorkerId(name) for name in order)
        self._delay_s = delay_s

    def place(self, view: Any, request: Any, now: float) -> Placement:
        time.sleep(self._delay_s)
        placement = self._inner.place(view, request, now)
        return Placement(
            decode=WorkerId("decode-0"),
            prefill=self._order,
            prefill_tokens=placement.prefill_tokens,
            prefill_s=placement.prefill_s,
        )


class FailingFiller(Wrapped):
    """Breaks down after a delay, so that D goes to its next candidate."""

    async def fill(self, *arguments: Any) -> AsyncIterator[Any]:
        await asyncio.sleep(DELAY_S)
        raise RuntimeError("this filler breaks down")
        yield


class SlowSubmit(Wrapped):
    """The engine's inbox is slow: the time between acceptance and the first step."""

    def submit(self, spec: Any) -> None:
        time.sleep(DELAY_S)
        self._inner.submit(spec)


class SlowRunner(Wrapped):
    """Delays steps that sample, or those that do not."""

    def __init__(self, inner: Any, *, sampling: bool) -> None:
        super().__init__(inner)
        self._sampling = sampling

    def run(self, batch: BatchSpec) -> Any:
        samples = any(chunk.sampling is not None for chunk in batch.chunks)
        if samples == self._sampling:
            time.sleep(DELAY_S)
        return self._inner.run(batch)


class SlowImporter(Wrapped):
    async def fetch(self, grant: Grant) -> Landed | Failed:
        await asyncio.sleep(DELAY_S)
        landed: Landed | Failed = await self._inner.fetch(grant)
        return landed


class SlowImporters(Wrapped):
    async def get(self, *arguments: Any) -> Any:
        return SlowImporter(await self._inner.get(*arguments))


ORDER = ("prefill-0",)

STAGES: dict[str, tuple[dict[str, Seams], RouterSeams, Sequence[str]]] = {
    "nothing": ({}, RouterSeams(), ORDER),
    "queue": ({}, RouterSeams(tokenizer=SlowTokenizer), ORDER),
    "locate": ({}, RouterSeams(index=SlowIndex), ORDER),
    "place": ({}, RouterSeams(policy=lambda policy: OrderedPolicy(policy, ORDER, DELAY_S)), ORDER),
    "retry": ({"prefill-1": Seams(filler=FailingFiller)}, RouterSeams(), ("prefill-1", "prefill-0")),
    "prefill_queue": ({"prefill-0": Seams(engine=SlowSubmit)}, RouterSeams(), ORDER),
    "prefill": (
        {"prefill-0": Seams(runner=lambda runner: SlowRunner(runner, sampling=False))},
        RouterSeams(),
        ORDER,
    ),
    "exposed_transfer": ({"decode-0": Seams(importers=SlowImporters)}, RouterSeams(), ORDER),
    "first_step": (
        {"decode-0": Seams(runner=lambda runner: SlowRunner(runner, sampling=True))},
        RouterSeams(),
        ORDER,
    ),
}


@pytest.mark.parametrize("stage", list(STAGES))
async def test_a_delay_shows_in_its_own_part_of_the_ledger_and_in_no_other(
    stage: str, tiny_model: Path, redis: RedisServer
) -> None:
    seams, router, order = STAGES[stage]
    if stage != "place":
        router = RouterSeams(router.tokenizer, router.index, lambda policy: OrderedPolicy(policy, order, 0.0))
    ledgers: list[Ledger] = []
    async with stack(tiny_config(tiny_model, redis), WORKERS, seams=seams, router=router) as running:
        assert running.client is not None
        for number in range(TRIES):
            # Another prompt each time, so that nothing is reused; one chunk, so that nothing overlaps.
            result = await running.client.generate(f"{number} bottles of milk", max_tokens=2, ignore_eos=True)
            assert result.route.prefill_worker == "prefill-0"
            parts = result.ledger.parts()
            assert min(parts.values()) >= 0, parts
            assert sum(parts.values()) == pytest.approx(result.ttft_s, abs=1e-3)
            ledgers.append(result.ledger)
    # The least of a few tries is free of a busy machine's noise.
    least = {name: min(ledger.parts()[name] for ledger in ledgers) for name in ledgers[0].parts()}
    grown = {name for name, seconds in least.items() if seconds >= DELAY_S * 0.8}
    assert grown == ({stage} if stage != "nothing" else set()), least
