"""How long a whole handoff takes, Open to COMMITTED over gRPC between two processes, when P has the KV.

The transport's `fetch` is one part of it; the rest is four messages each way and what both sides book.
"""

import asyncio
import itertools
import multiprocessing
import os
import statistics
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection

import grpc
import torch
import uvloop

from pdserve.bench.child_process import follow_parent
from pdserve.bench.figures import Transaction
from pdserve.core.channel_options import SERVER_OPTIONS
from pdserve.core.clock import Clock, MonotonicClock
from pdserve.core.config import HandoffConfig
from pdserve.core.errors import Unavailable
from pdserve.core.types import (
    BLOCK_TOKENS,
    BlockName,
    Incarnation,
    OwnerId,
    RequestId,
    Role,
    WorkerId,
    blocks_for,
)
from pdserve.core.worker_record import WorkerRecord
from pdserve.kvtransfer.handoff.consumer import Committed, DecodeHandoffs, HandoffAsk, HandoffPeer
from pdserve.kvtransfer.handoff.filler import FillEstimate, FillProgress
from pdserve.kvtransfer.handoff.producer import HandoffServicer
from pdserve.kvtransfer.names import chain, namespace
from pdserve.kvtransfer.pool.layout import KvLayout
from pdserve.kvtransfer.pool.pool import KvPool
from pdserve.kvtransfer.pool.storage import KvStorage
from pdserve.kvtransfer.transports.base import accepted
from pdserve.kvtransfer.transports.importers import ImporterCache
from pdserve.kvtransfer.transports.ladder import make_exporters
from pdserve.proto import handoff_pb2_grpc

_SCHEMA = bytes(16)
_ROOT = namespace(_SCHEMA)
_PREFILL, _DECODE = WorkerId("prefill-0"), WorkerId("decode-0")
_FIRST = Incarnation("bench")
_WARM_UP_ROUNDS = 5


async def measure_transactions(
    layout: KvLayout, transports: Sequence[str], count: int, rounds: int, device: str
) -> list[Transaction]:
    """Handoffs of `count` blocks between pools on `device`, over each transport, without and with digests.

    They take turns. Raises Unavailable where one is not served.
    """
    num_blocks = 4 * (count + 1)
    readers: dict[tuple[str, bool], _Reader] = {}
    with _prefill_process(layout, num_blocks, tuple(transports), device) as endpoint:
        for transport, digest in itertools.product(transports, (False, True)):
            storage = KvStorage(layout, num_blocks, device)
            readers[transport, digest] = _Reader(storage, transport, digest, endpoint)
        times: dict[tuple[str, bool], list[float]] = {key: [] for key in readers}
        try:
            for number in range(_WARM_UP_ROUNDS + rounds):
                for key, reader in readers.items():
                    seconds = await reader.fetch(count)
                    if number >= _WARM_UP_ROUNDS:
                        times[key].append(seconds)
        finally:
            for reader in readers.values():
                await reader.close()
    size = count * layout.block_bytes
    return [
        Transaction(*key[:1], size, key[1], statistics.median(taken) * 1e3) for key, taken in times.items()
    ]


class _Reader:
    """D: handoffs over one transport."""

    def __init__(self, storage: KvStorage, transport: str, digest: bool, endpoint: str) -> None:
        storage.tensor.zero_()  # every page is there before anything is timed
        self._storage = storage
        self._pool = KvPool(storage.layout, storage.num_blocks, storage.generations)
        self._peer = HandoffPeer(_PREFILL, _FIRST, endpoint)
        self._numbers = itertools.count(1)
        self._tag = f"{transport}-{digest}"
        self._handoffs = DecodeHandoffs(
            record=lambda: _record(_DECODE, Role.DECODE, storage),
            pool=self._pool,
            storage=storage,
            importers=ImporterCache(storage, accepted(transport)),
            config=HandoffConfig(transport=transport, digest=digest),
            progress=itertools.count().__next__,
            clock=MonotonicClock(),
        )

    async def fetch(self, count: int) -> float:
        """One handoff of a prompt that nobody has seen; seconds."""
        number = next(self._numbers)
        tokens = (number, *range(count * BLOCK_TOKENS))
        owner = OwnerId(f"handoff/{number}")
        request = RequestId(f"{self._tag}-{number}")
        ask = HandoffAsk(request, tokens, chain(_ROOT, tokens), None, owner)
        began = time.perf_counter()
        result = await self._handoffs.fetch(ask, self._peer)
        taken = time.perf_counter() - began
        if not isinstance(result, Committed):
            raise Unavailable(f"the handoff was not served: {result.message}")
        if result.blocks_moved != count:
            raise Unavailable(f"{result.blocks_moved} blocks moved instead of {count}: no figure to compare")
        self._pool.release(owner)
        return taken

    async def close(self) -> None:
        await self._handoffs.close()
        self._handoffs.check_integrity()
        self._storage.close()


class _ComputedFiller:
    """Of any prompt, it has all KV at once: what the blocks happen to hold."""

    def __init__(self, pool: KvPool, clock: Clock) -> None:
        self._pool = pool
        self._clock = clock

    def estimate(self, new_tokens: int, cached_tokens: int) -> FillEstimate:
        return FillEstimate(seconds=0.0, queue_position=0)

    async def fill(
        self, owner: OwnerId, token_ids: Sequence[int], chain: Sequence[BlockName]
    ) -> AsyncIterator[FillProgress]:
        if self._pool.allocate(owner, blocks_for(len(token_ids))) is None:
            raise Unavailable("the benchmark's prefill pool is full")
        now = self._clock.now()
        yield FillProgress(len(token_ids), queued_at=now, started_at=now, ended_at=now)


@contextmanager
def _prefill_process(
    layout: KvLayout, num_blocks: int, transports: tuple[str, ...], device: str
) -> Iterator[str]:
    """P in a process of its own; its host:port."""
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(
        target=_main, args=(theirs, layout, num_blocks, transports, device), daemon=True
    )
    process.start()
    theirs.close()
    try:
        try:
            endpoint = str(pipe.recv())
        except (EOFError, OSError) as error:
            raise Unavailable("the prefill process has ended; stderr has its reason") from error
        yield endpoint
    finally:
        pipe.close()
        process.join(5.0)
        if process.is_alive():
            process.kill()
            process.join()


def _main(
    pipe: Connection, layout: KvLayout, num_blocks: int, transports: tuple[str, ...], device: str
) -> None:
    follow_parent()
    torch.set_num_threads(1)
    uvloop.run(_serve(pipe, KvStorage(layout, num_blocks, device), transports))


async def _serve(pipe: Connection, storage: KvStorage, transports: tuple[str, ...]) -> None:
    """Until the other end of the pipe is closed."""
    storage.tensor.zero_()
    pool, clock = KvPool(storage.layout, storage.num_blocks, storage.generations), MonotonicClock()
    servicer = HandoffServicer(
        record=lambda: _record(_PREFILL, Role.PREFILL, storage),
        pool=pool,
        storage=storage,
        filler=_ComputedFiller(pool, clock),
        exporters=make_exporters(storage, transports),
        config=HandoffConfig(),
        progress=itertools.count().__next__,
        clock=clock,
    )
    await servicer.start()
    server = grpc.aio.server(options=SERVER_OPTIONS)
    handoff_pb2_grpc.add_HandoffServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    pipe.send(f"127.0.0.1:{port}")
    try:
        await asyncio.to_thread(pipe.recv)
    except EOFError:
        await server.stop(0)
        await servicer.close()
        storage.close()


def _record(worker: WorkerId, role: Role, storage: KvStorage) -> WorkerRecord:
    return WorkerRecord(
        worker=worker,
        incarnation=_FIRST,
        role=role,
        model="bench",
        schema=_SCHEMA.hex(),
        endpoint="",
        pid=os.getpid(),
        context_tokens=1 << 20,
        vocab_size=1 << 20,
        dtype=storage.layout.dtype,
        pool_blocks=storage.num_blocks,
        role_weight=0.0 if role is Role.DECODE else 1.0,
    )
