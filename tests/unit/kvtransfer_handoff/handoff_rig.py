"""Two workers' pools, a real gRPC server on loopback and a filler that writes known bytes.

Faults come from outside: a wrapped importer, exporter or filler, a cancelled call, bytes changed in P's pool.
"""

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field

import grpc
import numpy as np

from pdserve.core.channel_options import SERVER_OPTIONS
from pdserve.core.clock import Clock, MonotonicClock
from pdserve.core.config import HandoffConfig
from pdserve.core.lifecycle import Lifecycle
from pdserve.core.perfmodel import PerfModel
from pdserve.core.types import (
    BLOCK_TOKENS,
    BlockId,
    BlockName,
    HandoffId,
    Incarnation,
    OwnerId,
    RequestId,
    Role,
    WorkerId,
    blocks_for,
)
from pdserve.core.worker_record import WorkerRecord
from pdserve.kvtransfer.handoff.consumer import DecodeHandoffs, HandoffAsk, HandoffPeer
from pdserve.kvtransfer.handoff.producer import FillEstimate, FillProgress, HandoffServicer
from pdserve.kvtransfer.names import chain, namespace
from pdserve.kvtransfer.pool.layout import KvLayout
from pdserve.kvtransfer.pool.pool import KvPool
from pdserve.kvtransfer.pool.storage import KvStorage
from pdserve.kvtransfer.transports.base import (
    TRANSPORT_LADDER,
    Exporter,
    Failed,
    Grant,
    Importer,
    Landed,
    Offer,
    SourceDone,
)
from pdserve.kvtransfer.transports.importers import ImporterCache
from pdserve.kvtransfer.transports.ladder import make_exporters
from pdserve.proto import handoff_pb2_grpc

LAYOUT = KvLayout(num_layers=2, num_kv_heads=2, head_dim=4, dtype="float32")
SCHEMA = b"\x01" * 16
ROOT = namespace(SCHEMA)
PATIENT = HandoffConfig(heartbeat_s=0.05, silence_s=20.0, request_deadline_s=30.0)
QUICK = dataclasses.replace(PATIENT, silence_s=0.5)
"""For tests of silence alone: a busy machine is silent for as long."""


def content(index: int, tokens: Sequence[int]) -> np.ndarray:
    """The known bytes of a prompt's block `index`: float32 of the layout's block shape, a function of its
    tokens; positions that hold no token are zero.
    """
    values = np.zeros(LAYOUT.block_shape, np.float32)
    part = tokens[index * BLOCK_TOKENS : (index + 1) * BLOCK_TOKENS]
    for at, token in enumerate(part):
        values[:, :, :, at, :] = token + np.arange(values[:, :, :, at, :].size).reshape(2, 2, 2, 4) / 64
    return values


@dataclass
class Side:
    """One worker's memory."""

    num_blocks: int
    storage: KvStorage = field(init=False)
    pool: KvPool = field(init=False)

    def __post_init__(self) -> None:
        self.storage = KvStorage(LAYOUT, self.num_blocks)
        self.pool = KvPool(LAYOUT, self.num_blocks, self.storage.generations)

    def write(self, block: BlockId, values: np.ndarray) -> None:
        self.storage.bytes_view[block] = np.frombuffer(values.tobytes(), np.uint8)

    def read(self, block: BlockId) -> np.ndarray:
        return np.frombuffer(self.storage.bytes_view[block].tobytes(), np.float32).reshape(LAYOUT.block_shape)


class KnownFiller:
    """Computes `chunk_tokens` positions per step; `gate`, where set, is awaited before each step."""

    def __init__(self, side: Side, chunk_tokens: int = 32) -> None:
        self.side = side
        self.chunk_tokens = chunk_tokens
        self.gate: Callable[[int], asyncio.Future[None] | None] = lambda step: None
        self.gates: dict[int, Callable[[int], asyncio.Future[None] | None]] = {}
        """Instead of `gate`, for prompts that begin with a given token."""
        self.estimate_s: float | None = None
        self.estimate_error: float | None = None
        self.fail_at: int | None = None
        self.stop_at: int | None = None
        self.begun = asyncio.Event()
        """The engine is at its first step."""
        self.ended: list[OwnerId] = []

    def estimate(self, new_tokens: int, cached_tokens: int) -> FillEstimate:
        seconds = new_tokens / 1000 if self.estimate_s is None else self.estimate_s
        return FillEstimate(seconds, queue_position=0, relative_error=self.estimate_error)

    async def fill(
        self, owner: OwnerId, token_ids: Sequence[int], chain: Sequence[BlockName]
    ) -> AsyncIterator[FillProgress]:
        pool, total = self.side.pool, len(token_ids)
        clock = MonotonicClock()
        try:
            cached = len(pool.acquire_prefix(owner, chain))
            if pool.allocate(owner, blocks_for(total) - cached) is None:
                raise RuntimeError("P's pool is full")
            started = clock.now()
            computed, step = cached * BLOCK_TOKENS, 0
            while True:
                self.begun.set()
                waiting = self.gates.get(token_ids[0], self.gate)(step)
                if waiting is not None:
                    await waiting
                if self.fail_at == step:
                    raise RuntimeError("the engine broke")
                if self.stop_at == step:
                    return
                computed = min(total, computed + self.chunk_tokens)
                self._write(owner, token_ids, chain, cached, computed)
                ended = clock.now() if computed == total else None
                yield FillProgress(
                    num_computed=computed,
                    queued_at=started,
                    started_at=started,
                    ended_at=ended,
                    cached_tokens=cached * BLOCK_TOKENS,
                )
                step += 1
                if ended is not None:
                    return
        finally:
            self.ended.append(owner)

    def _write(
        self, owner: OwnerId, tokens: Sequence[int], chain: Sequence[BlockName], cached: int, computed: int
    ) -> None:
        table = self.side.pool.table(owner)
        for index in range(cached, blocks_for(computed)):
            self.side.write(table[index], content(index, tokens[:computed]))
            if (index + 1) * BLOCK_TOKENS <= computed:
                self.side.pool.name(owner, table[index], chain[index])


class HeldImporter:
    """An importer whose fetches wait for `gate`, then go on; `fail`: they report Failed instead.

    Like every importer it returns only when no late write can follow: a cancelled fetch that is past the gate
    is finished first.
    """

    def __init__(self, inner: Importer) -> None:
        self._inner = inner
        self.transport = inner.transport
        self.gate = asyncio.Event()
        self.gate.set()
        self.entered = asyncio.Event()
        self.fail = False
        self.stubborn = False
        """Whether a cancel is ignored until the gate opens: a copy that is under way."""

    async def fetch(self, grant: Grant) -> Landed | Failed:
        self.entered.set()
        while not self.gate.is_set():
            try:
                await self.gate.wait()
            except asyncio.CancelledError:
                if not self.stubborn:
                    raise
        if self.fail:
            return Failed(grant.handoff, grant.epoch, grant.seq, "the link is cut")
        return await self._inner.fetch(grant)

    async def close(self) -> None:
        await self._inner.close()


class HeldImporters:
    """Hands out one wrapped importer for each of the cache's."""

    def __init__(self, inner: ImporterCache, wrap: Callable[[Importer], Importer]) -> None:
        self._inner = inner
        self._wrap = wrap
        self._wrapped: dict[int, Importer] = {}
        self.given = 0
        self.dropped: list[tuple[WorkerId, Incarnation]] = []

    async def get(
        self, worker: WorkerId, incarnation: Incarnation, offers: Sequence[Offer]
    ) -> Importer | None:
        importer = await self._inner.get(worker, incarnation, offers)
        self.given += 1
        if importer is None:
            return None
        if id(importer) not in self._wrapped:
            self._wrapped[id(importer)] = self._wrap(importer)
        return self._wrapped[id(importer)]

    async def drop(self, worker: WorkerId, incarnation: Incarnation) -> None:
        self.dropped.append((worker, incarnation))
        await self._inner.drop(worker, incarnation)

    async def close(self) -> None:
        await self._inner.close()


class HeldExporter:
    """An exporter whose serves wait for `gate`: P cannot release while one of them runs."""

    def __init__(self, inner: Exporter) -> None:
        self._inner = inner
        self.transport = inner.transport
        self.gate = asyncio.Event()

    async def start(self) -> None:
        await self._inner.start()

    def offer(self) -> Offer:
        return self._inner.offer()

    async def serve(self, grant: Grant) -> SourceDone | Failed:
        await self.gate.wait()
        return await self._inner.serve(grant)

    def forget(self, handoff: HandoffId) -> None:
        self._inner.forget(handoff)

    async def close(self) -> None:
        await self._inner.close()


class Wire:
    """A TCP way between D and P that can be cut or turn silent."""

    def __init__(self) -> None:
        self._writers: set[asyncio.StreamWriter] = set()
        self._flowing = asyncio.Event()
        self._flowing.set()

    async def start(self, target: int) -> int:
        """Returns the port to connect to."""
        self._target = target
        self._server = await asyncio.start_server(self._join, "127.0.0.1", 0)
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    def cut(self) -> None:
        """Both ends see the connection reset."""
        self._flowing.set()
        for writer in self._writers:
            writer.transport.abort()

    def silence(self) -> None:
        """Nothing arrives any more, and nobody is told."""
        self._flowing.clear()

    async def close(self) -> None:
        self._server.close()
        self.cut()

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
        self._writers |= {writer, far_writer}
        await asyncio.gather(self._pump(reader, far_writer), self._pump(far_reader, writer))

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                await self._flowing.wait()
                writer.write(data)
                await writer.drain()
        writer.close()


class Trail:
    """An observer that remembers, and lets a test wait for an event."""

    def __init__(self) -> None:
        self.events: list[tuple[Lifecycle, Mapping[str, object]]] = []
        self._waiting: list[tuple[Lifecycle, asyncio.Future[Mapping[str, object]]]] = []
        self.hooks: dict[Lifecycle, Callable[[Mapping[str, object]], None]] = {}

    def __call__(self, event: Lifecycle, facts: Mapping[str, object]) -> None:
        self.events.append((event, facts))
        if event in self.hooks:
            self.hooks[event](facts)
        for wanted, future in self._waiting:
            if wanted is event and not future.done():
                future.set_result(facts)

    def names(self) -> list[Lifecycle]:
        return [event for event, _ in self.events]

    async def wait(self, event: Lifecycle) -> Mapping[str, object]:
        for seen, facts in self.events:
            if seen is event:
                return facts
        future: asyncio.Future[Mapping[str, object]] = asyncio.get_running_loop().create_future()
        self._waiting.append((event, future))
        return await future


class Rig:
    """P behind a gRPC server, D beside it. Enter it as an async context; all books are checked at the end."""

    def __init__(
        self,
        transport: str = "shm",
        *,
        decode_blocks: int = 32,
        prefill_blocks: int = 32,
        config: HandoffConfig = PATIENT,
        prefill_config: HandoffConfig | None = None,
        schema: bytes = SCHEMA,
        defects: int = 0,
        perf: PerfModel | None = None,
        decode_clock: Clock | None = None,
    ) -> None:
        """`defects`: how many a test makes on purpose."""
        self._perf, self._decode_clock = perf, decode_clock or MonotonicClock()
        self._defects = defects
        self.p, self.d = Side(prefill_blocks), Side(decode_blocks)
        self.filler = KnownFiller(self.p)
        self.trail, self.prefill_trail = Trail(), Trail()
        self.importers: list[HeldImporter] = []
        self.met = asyncio.Event()
        """D has an importer: it connects beside the first chunks, which may be known before."""
        self.prepare: Callable[[HeldImporter], None] = lambda importer: None
        self.wrap_exporter: Callable[[Exporter], Exporter] = lambda exporter: exporter
        self.draining = False
        self.relieve: Callable[[int], object] = lambda blocks: None
        self.transfers: list[tuple[int, float, str]] = []
        self.progress = 0
        self._config, self._transport = config, transport
        self._prefill_config = prefill_config or config
        self._schema = schema
        self._attempts = 0

    def record(self, role: Role) -> WorkerRecord:
        return WorkerRecord(
            worker=WorkerId(f"{role}-0"),
            incarnation=Incarnation(f"{role}-first"),
            role=role,
            model="test",
            schema=(self._schema if role is Role.PREFILL else SCHEMA).hex(),
            endpoint="",
            pid=4242,
            context_tokens=4096,
            vocab_size=1000,
            dtype=LAYOUT.dtype,
            pool_blocks=self.p.num_blocks,
            role_weight=0.0 if role is Role.DECODE else 1.0,
            draining=self.draining and role is Role.PREFILL,
        )

    async def __aenter__(self) -> "Rig":
        allowed = TRANSPORT_LADDER if self._transport == "auto" else (self._transport,)
        made = make_exporters(self.p.storage, TRANSPORT_LADDER, timeout_s=5.0)
        self.exporters = [self.wrap_exporter(exporter) for exporter in made]
        self.servicer = HandoffServicer(
            record=lambda: self.record(Role.PREFILL),
            pool=self.p.pool,
            storage=self.p.storage,
            filler=self.filler,
            exporters=self.exporters,
            config=self._prefill_config,
            progress=self._moving,
            clock=MonotonicClock(),
            observer=self.prefill_trail,
        )
        await self.servicer.start()
        self.server = grpc.aio.server(options=SERVER_OPTIONS)
        handoff_pb2_grpc.add_HandoffServicer_to_server(self.servicer, self.server)
        self.port = self.server.add_insecure_port("127.0.0.1:0")
        await self.server.start()
        cache = ImporterCache(self.d.storage, allowed, timeout_s=5.0)
        self.importer_source = HeldImporters(cache, self._wrap_importer)
        self.handoffs = DecodeHandoffs(
            record=lambda: self.record(Role.DECODE),
            pool=self.d.pool,
            storage=self.d.storage,
            importers=self.importer_source,
            config=self._config,
            progress=self._moving,
            clock=self._decode_clock,
            observer=self.trail,
            transferred=lambda *transfer: self.transfers.append(transfer),
            relieve=lambda blocks: self.relieve(blocks),
            perf=self._perf,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.handoffs.close()
        await self.servicer.close()
        await self.server.stop(None)
        self.check()
        for side in (self.p, self.d):
            side.pool.check_integrity()
            side.storage.close()

    def check(self) -> None:
        """Both sides at rest: nothing in flight, nothing between states."""
        self.handoffs.check_integrity()
        self.servicer.check_integrity()
        for side in (self.p, self.d):
            counts = side.pool.counts()
            assert (counts.reserved, counts.loading, counts.quarantined) == (0, 0, 0), counts
        assert self.p.pool.counts().held == 0
        assert self.handoffs.in_flight() == self.servicer.in_flight() == 0
        counters = (self.handoffs.counters, self.servicer.counters)
        assert sum(counted.get("defects", 0) for counted in counters) == self._defects

    def ask(self, tokens: Sequence[int], *, remaining_s: float | None = None) -> HandoffAsk:
        self._attempts += 1
        return HandoffAsk(
            request_id=RequestId(f"request-{self._attempts}"),
            token_ids=tuple(tokens),
            chain=chain(ROOT, tokens),
            remaining_s=remaining_s,
            owner=OwnerId(f"handoff/{self._attempts}"),
        )

    def peer(self, *, incarnation: str = "prefill-first", port: int | None = None) -> HandoffPeer:
        endpoint = f"127.0.0.1:{self.port if port is None else port}"
        return HandoffPeer(WorkerId("prefill-0"), Incarnation(incarnation), endpoint)

    async def at_rest(self) -> None:
        """Wait until both sides have let go of everything."""
        await self.handoffs.until_idle(20)
        await self.servicer.until_idle(20)

    def assert_content(self, ask: HandoffAsk) -> None:
        """D's table holds the prompt's KV, position for position."""
        table = self.d.pool.table(ask.owner)
        assert len(table) == blocks_for(len(ask.token_ids))
        travelled = ask.token_ids[:-1]
        for index in range(blocks_for(len(travelled))):
            valid = min(BLOCK_TOKENS, len(travelled) - index * BLOCK_TOKENS)
            got = self.d.read(table[index])[:, :, :, :valid, :]
            want = content(index, travelled)[:, :, :, :valid, :]
            np.testing.assert_array_equal(got, want)

    def _moving(self) -> int:
        self.progress += 1
        return self.progress

    def _wrap_importer(self, inner: Importer) -> Importer:
        held = HeldImporter(inner)
        self.importers.append(held)
        self.met.set()
        self.prepare(held)
        return held
