"""What the overlap benchmark holds back, and that its report says what the runs said."""

import asyncio
import dataclasses
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import cast

import pytest
from stack import stack, tiny_config

from pdserve.bench import overlap
from pdserve.bench.fetch_hold import FetchHold
from pdserve.bench.overlap import OverlapFigure, OverlapReport, measure_overlap
from pdserve.cli.app import run
from pdserve.cluster.redis_server import RedisServer
from pdserve.core.config import EngineConfig, HandoffConfig, ServeConfig
from pdserve.core.errors import Unavailable
from pdserve.core.lifecycle import Lifecycle
from pdserve.core.types import BlockName, OwnerId, Role
from pdserve.kvtransfer.handoff.filler import Filler, FillProgress
from pdserve.workers.seams import Seams

TOKENS = 200
"""Several chunks of 32."""


class Watched(FetchHold):
    """A hold that remembers the order of events."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Lifecycle] = []
        self.landed = asyncio.Event()

    def __call__(self, event: Lifecycle, facts: Mapping[str, object]) -> None:
        super().__call__(event, facts)
        self.events.append(event)
        if event is Lifecycle.CHUNK_LANDED:
            self.landed.set()

    def landed_before_filled(self) -> int:
        """Chunks that were D's when it read that P was FILLED."""
        filled = self.events.index(Lifecycle.FILLED_SEEN)
        return self.events[:filled].count(Lifecycle.CHUNK_LANDED)


class LateEnd:
    """P's filler, which says that a prompt is computed only when it may."""

    def __init__(self, inner: Filler, may_end: Callable[[], Awaitable[object]]) -> None:
        self.estimate = inner.estimate
        self._inner = inner
        self._may_end = may_end

    async def fill(
        self, owner: OwnerId, token_ids: Sequence[int], chain: Sequence[BlockName]
    ) -> AsyncIterator[FillProgress]:
        async with aclosing(
            cast(AsyncGenerator[FillProgress], self._inner.fill(owner, token_ids, chain))
        ) as steps:
            async for progress in steps:
                if progress.ended_at is not None:
                    async with asyncio.timeout(20):
                        await self._may_end()
                yield progress


@pytest.mark.parametrize("transport", ["shm", "tcp"])
async def test_a_held_handoff_fetches_nothing_before_p_is_filled(
    tiny_model: Path, redis: RedisServer, transport: str
) -> None:
    hold = Watched()
    config = tiny_config(tiny_model, redis, handoff=HandoffConfig(transport=transport, silence_s=60.0))
    held = False

    async def may_end() -> None:
        if not held:
            await hold.landed.wait()

    seams = {
        "prefill-0": Seams(filler=lambda filler: LateEnd(filler, may_end)),
        "decode-0": Seams(observer=hold, importers=hold.wrap),
    }
    workers = {"prefill-0": Role.PREFILL, "decode-0": Role.DECODE}
    async with stack(config, workers, seams=seams) as running:
        assert running.client is not None
        for held in (False, True):
            prompt = [int(held), *range(TOKENS - 1)]  # no block in common
            hold.events.clear()
            hold.prepare(held)
            result = await running.client.generate(token_ids=prompt, max_tokens=1, temperature=0.0)
            assert (result.route.transport, result.route.blocks_reused) == (transport, 0)
            assert hold.events.count(Lifecycle.CHUNK_LANDED) > 1, "there is something to overlap"
            assert (hold.landed_before_filled() == 0) is held


@pytest.mark.full
async def test_runs_in_processes_alternate_and_the_figures_are_their_medians(tiny_model: Path) -> None:
    config = ServeConfig(
        model=str(tiny_model), engine=EngineConfig(pool_blocks=32, chunk_tokens=32, token_budget=64)
    )
    lines: list[str] = []
    report = await measure_overlap(
        config, prompt_tokens=TOKENS, pairs=3, transports=("shm",), tell=lines.append
    )
    (figure,) = report.results
    assert len(lines) == 4
    assert figure.overlapped_ms == sorted(figure.overlapped_runs_ms)[1]
    assert figure.held_ms == sorted(figure.held_runs_ms)[1]
    assert figure.ratio == pytest.approx(figure.overlapped_ms / figure.held_ms)


@pytest.mark.full
async def test_a_prompt_that_p_does_not_prefill_is_no_figure(tiny_model: Path) -> None:
    config = ServeConfig(model=str(tiny_model), engine=EngineConfig(pool_blocks=16, chunk_tokens=32))
    with pytest.raises(Unavailable, match="this run shows nothing"):
        await measure_overlap(config, prompt_tokens=TOKENS, pairs=1, transports=("shm",))


def test_the_command_shows_and_writes_what_was_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: dict[str, object] = {}

    async def measure(config: ServeConfig, **options: object) -> OverlapReport:
        asked.update(options, model=config.model)
        figure = OverlapFigure("tcp", 3.25, 26.0, 0.125, 9.5, 184_000_000, (3.25,), (26.0,))
        return OverlapReport(config.model, config.dtype, 96, config.engine.chunk_tokens, 1, (figure,))

    monkeypatch.setattr(overlap, "measure_overlap", measure)
    file = tmp_path / "out.json"
    arguments = ["bench", "overlap", "--tokens", "96", "--pairs", "1", "--transport", "tcp"]
    assert run([*arguments, "--json", str(file)]) == 0
    assert {key: asked[key] for key in ("prompt_tokens", "pairs", "transports", "model")} == {
        "prompt_tokens": 96,
        "pairs": 1,
        "transports": ["tcp"],
        "model": "smollm2-135m",
    }
    shown = capsys.readouterr().out
    for text in ("184.0", "9.50", "3.25", "26.00", "0.125", "96 tokens in chunks of 256"):
        assert text in shown
    assert json.loads(file.read_text())["results"][0]["ratio"] == 0.125
    assert dataclasses.asdict(ServeConfig())["engine"]["chunk_tokens"] == 256
