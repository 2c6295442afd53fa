"""Workers that hand off and fetch prefixes over real gRPC: each has a pool, both sides, a known filler."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence

import grpc
import numpy as np
from handoff_rig import (
    LAYOUT,
    PATIENT,
    ROOT,
    SCHEMA,
    HeldImporter,
    HeldImporters,
    KnownFiller,
    Side,
    Trail,
    content,
)

from pdserve.core.channel_options import SERVER_OPTIONS
from pdserve.core.clock import MonotonicClock
from pdserve.core.config import HandoffConfig
from pdserve.core.perfmodel import PerfModel
from pdserve.core.types import (
    BLOCK_TOKENS,
    Incarnation,
    OwnerId,
    RequestId,
    Role,
    WorkerId,
    blocks_for,
    hit_limit,
)
from pdserve.core.worker_record import WorkerRecord
from pdserve.kvtransfer.handoff.ask import HandoffAsk, HandoffPeer, PrefixHolder
from pdserve.kvtransfer.handoff.consumer import DecodeHandoffs
from pdserve.kvtransfer.handoff.prefix_fetch import PrefixAsk, PrefixFetch
from pdserve.kvtransfer.handoff.producer import HandoffServicer
from pdserve.kvtransfer.names import chain
from pdserve.kvtransfer.transports.base import TRANSPORT_LADDER, Importer
from pdserve.kvtransfer.transports.importers import ImporterCache
from pdserve.kvtransfer.transports.ladder import make_exporters
from pdserve.proto import handoff_pb2_grpc

DEAR = {"prefill/step_seconds": 100.0, "prefill/token_seconds": 1.0, "prefill/attention_seconds": 0.0}
"""A performance model by which nothing is worth computing that somebody holds."""

CHEAP = {"prefill/step_seconds": 0.0, "prefill/token_seconds": 0.0, "prefill/attention_seconds": 0.0}
"""And one by which nothing is worth a fetch."""

SLOW_WAY = {**DEAR, **{f"transfer/{way}/latency_seconds": 20.0 for way in ("inproc", "shm", "tcp")}}
"""Fetches may take a minute, so that a test decides how they end."""


class Mate:
    """One worker: it prefills for others, hands off, and fetches prefixes."""

    def __init__(
        self,
        name: str,
        *,
        blocks: int = 32,
        perf: dict[str, float] = SLOW_WAY,
        config: HandoffConfig = PATIENT,
        transport: str = "shm",
    ) -> None:
        self.name = name
        self.side = Side(blocks)
        self.pool = self.side.pool
        self.filler = KnownFiller(self.side)
        self.trail, self.serving_trail = Trail(), Trail()
        self.perf = PerfModel()
        self.perf.restore(perf)
        self.met = asyncio.Event()
        self.importers: list[HeldImporter] = []
        self.prepare: Callable[[HeldImporter], None] = lambda importer: None
        self.progress: Callable[[], int] | None = None
        self.incarnation = f"{name}-first"
        self.draining = False
        self.schema = SCHEMA
        self._config, self._transport = config, transport
        self._moves = 0
        self._serial = 0

    def record(self) -> WorkerRecord:
        return WorkerRecord(
            worker=WorkerId(self.name),
            incarnation=Incarnation(self.incarnation),
            role=Role.MIXED,
            model="test",
            schema=self.schema.hex(),
            endpoint="",
            pid=4242,
            context_tokens=4096,
            vocab_size=1000,
            dtype=LAYOUT.dtype,
            pool_blocks=self.side.num_blocks,
            role_weight=0.5,
            draining=self.draining,
        )

    async def start(self) -> None:
        clock = MonotonicClock()
        cache = ImporterCache(self.side.storage, (self._transport,), timeout_s=5.0)
        self.handoffs = DecodeHandoffs(
            record=self.record,
            pool=self.pool,
            storage=self.side.storage,
            importers=HeldImporters(cache, self._wrap_importer),
            config=self._config,
            progress=self._moving,
            clock=clock,
            observer=self.trail,
        )
        self.prefixes = PrefixFetch(
            record=self.record,
            pool=self.pool,
            handoffs=self.handoffs,
            ways=cache.ways,
            perf=self.perf,
            chunk_tokens=self.filler.chunk_tokens,
            clock=clock,
        )
        self.servicer = HandoffServicer(
            record=self.record,
            pool=self.pool,
            storage=self.side.storage,
            filler=self.filler,
            exporters=make_exporters(self.side.storage, TRANSPORT_LADDER, timeout_s=5.0),
            config=self._config,
            progress=self._moving,
            clock=clock,
            observer=self.serving_trail,
            prefixes=self.prefixes,
        )
        await self.servicer.start()
        self.server = grpc.aio.server(options=SERVER_OPTIONS)
        handoff_pb2_grpc.add_HandoffServicer_to_server(self.servicer, self.server)
        self.port = self.server.add_insecure_port("127.0.0.1:0")
        await self.server.start()

    async def stop(self) -> None:
        await self.handoffs.close()
        await self.servicer.close()
        await self.server.stop(None)
        self.check()
        self.side.storage.close()

    def check(self) -> None:
        """At rest: nobody fetches, nobody serves, and no block is between states."""
        self.handoffs.check_integrity()
        self.servicer.check_integrity()
        counts = self.pool.counts()
        assert (counts.reserved, counts.loading, counts.quarantined) == (0, 0, 0), (self.name, counts)
        assert self.handoffs.in_flight() == self.servicer.in_flight() == 0
        for counters in (self.handoffs.counters, self.servicer.counters):
            assert not counters.get("defects"), (self.name, counters)

    def hold(self, tokens: Sequence[int], blocks: int | None = None) -> None:
        """Cache the KV of the prompt's first full blocks, all of them by default."""
        names = chain(ROOT, tokens)[:blocks]
        owner = OwnerId("test/hold")
        reused = self.pool.acquire(owner, names, len(names))
        assert reused is not None
        table = self.pool.table(owner)
        for index in range(reused, len(names)):
            self.side.write(table[index], content(index, tokens))
            self.pool.name(owner, table[index], names[index])
        self.pool.release(owner)

    def assert_held(self, tokens: Sequence[int], blocks: int) -> None:
        """The prompt's first blocks are here, byte for byte, and no more of it."""
        names, owner = chain(ROOT, tokens), OwnerId("test/read")
        table = self.pool.acquire_prefix(owner, names)
        assert len(table) == blocks
        for index, block in enumerate(table):
            np.testing.assert_array_equal(self.side.read(block), content(index, tokens))
        self.pool.release(owner)

    def holder(self, blocks: int, *, port: int | None = None) -> PrefixHolder:
        """What a hint says of this worker."""
        return PrefixHolder(self.peer(port=port), blocks)

    def peer(self, *, port: int | None = None) -> HandoffPeer:
        endpoint = f"127.0.0.1:{self.port if port is None else port}"
        return HandoffPeer(WorkerId(self.name), Incarnation(f"{self.name}-first"), endpoint)

    def prefix_ask(self, tokens: Sequence[int], holder: PrefixHolder | None) -> PrefixAsk:
        names = chain(ROOT, tokens)[: hit_limit(len(tokens))]
        return PrefixAsk(RequestId("request-p"), tuple(tokens), names, None, holder)

    def ask(self, tokens: Sequence[int], holder: PrefixHolder | None) -> HandoffAsk:
        """A prompt, as this worker asks another one to prefill it."""
        self._serial += 1
        return HandoffAsk(
            request_id=RequestId(f"request-{self._serial}"),
            token_ids=tuple(tokens),
            chain=chain(ROOT, tokens),
            remaining_s=None,
            owner=OwnerId(f"handoff/{self._serial}"),
            prefix=holder,
        )

    def assert_content(self, ask: HandoffAsk) -> None:
        """The table of a committed handoff holds the prompt's KV, position for position."""
        table, travelled = self.pool.table(ask.owner), ask.token_ids[:-1]
        assert len(table) == blocks_for(len(ask.token_ids))
        for index in range(blocks_for(len(travelled))):
            valid = min(BLOCK_TOKENS, len(travelled) - index * BLOCK_TOKENS)
            got = self.side.read(table[index])[:, :, :, :valid, :]
            np.testing.assert_array_equal(got, content(index, travelled)[:, :, :, :valid, :])

    def _moving(self) -> int:
        self._moves += 1
        return self._moves if self.progress is None else self.progress()

    def _wrap_importer(self, inner: Importer) -> Importer:
        held = HeldImporter(inner)
        self.importers.append(held)
        self.prepare(held)
        self.met.set()
        return held


@contextlib.asynccontextmanager
async def mates(*workers: Mate) -> AsyncIterator[None]:
    """All of them running; at the end all of them at rest, and their books checked."""
    async with contextlib.AsyncExitStack() as running:
        for worker in workers:
            await worker.start()
            running.push_async_callback(worker.stop)
        yield
        for worker in workers:
            await worker.handoffs.until_idle(20)
            await worker.servicer.until_idle(20)
