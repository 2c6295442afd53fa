"""A DecodeRole over a real pool, with handoffs and an engine that do what a test says."""

import asyncio
from collections.abc import Callable, Sequence

import numpy as np

from pdserve.core.clock import MonotonicClock
from pdserve.core.config import EngineConfig, SessionConfig
from pdserve.core.errors import InvalidRequest, PdserveError, Unavailable
from pdserve.core.perfmodel import PerfModel
from pdserve.core.types import (
    BlockId,
    Constraint,
    FinishReason,
    Incarnation,
    RequestId,
    Role,
    SamplingParams,
    SequenceId,
    WorkerId,
    blocks_for,
)
from pdserve.core.worker_record import WorkerRecord
from pdserve.kvtransfer.handoff.ask import Committed, HandoffAsk, HandoffPeer, NotServed, PrefixHolder
from pdserve.kvtransfer.handoff.prefix_fetch import PrefixFetch
from pdserve.kvtransfer.handoff.states import Outcome
from pdserve.kvtransfer.names import chain
from pdserve.kvtransfer.pool.layout import KvLayout
from pdserve.kvtransfer.pool.pool import KvPool
from pdserve.proto import worker_pb2
from pdserve.workers.decode_request import DecodeAsk, DecodeRequest, PrefillCandidate
from pdserve.workers.decode_role import DecodeRole
from pdserve.workers.engine.messages import SequenceOutput, SequenceSpec
from pdserve.workers.seams import ignore
from pdserve.workers.session_link import SessionLink
from pdserve.workers.text_preparation import TextPreparation

POOL_BLOCKS = 32
HEADROOM = 40
CHUNK_TOKENS = 64
ROOT = b"n" * 16
SEED = 77


class FakeHandoffs:
    """Answers each fetch with the next of `outcomes`; None waits until the request gives up."""

    def __init__(self, pool: KvPool, outcomes: Sequence[Outcome | str | None]) -> None:
        self._pool = pool
        self._outcomes = list(outcomes)
        self.asked: list[str] = []
        self.asks: list[HandoffAsk] = []
        self.lowest_transport = "tcp"
        self.begun = asyncio.Event()

    async def fetch(self, ask: HandoffAsk, peer: HandoffPeer) -> Committed | NotServed:
        self.asked.append(peer.worker)
        self.asks.append(ask)
        self.begun.set()
        outcome = self._outcomes.pop(0)
        if outcome is None:
            await asyncio.Event().wait()
        if isinstance(outcome, Outcome):
            return NotServed(outcome, f"{peer.worker} said {outcome}")
        assert self._pool.allocate(ask.owner, ask.blocks) is not None
        return Committed(
            owner=ask.owner,
            num_computed=ask.positions,
            transport="shm",
            blocks_moved=ask.blocks,
            bytes_moved=1,
            blocks_reused=0,
            prefill_queue_s=0.0,
            prefill_s=0.0,
            prefill_cached_tokens=0,
            filled_seen_at=0.0,
            committed_at=0.0,
            prefill_worker=peer.worker,
            prefill_incarnation=peer.incarnation,
            prefill_pid=1,
        )


class FakeDispatcher:
    """An engine that does what the test says."""

    def __init__(self, pool: KvPool) -> None:
        self._pool = pool
        self.sinks: dict[SequenceId, Callable[[SequenceOutput], None]] = {}
        self.specs: list[SequenceSpec] = []
        self.ended: set[SequenceId] = set()
        self.deaf: set[SequenceId] = set()
        """Sequences that are not aborted when they should be."""
        self.takes = 1000
        self.submitted = asyncio.Event()

    def after_step(self, callback: Callable[[], None]) -> None:
        self._after = callback

    def submit(self, spec: SequenceSpec, sink: Callable[[SequenceOutput], None]) -> None:
        if len(self.specs) >= self.takes:
            raise Unavailable("this engine is full")
        self.specs.append(spec)
        self.sinks[spec.sequence_id] = sink
        self.submitted.set()

    def abort(self, sequence: SequenceId) -> None:
        if sequence not in self.deaf:
            self.emit(sequence, 0, (), FinishReason.ABORT)

    def preempt(self, sequence: SequenceId, first: int) -> None:
        """`first` tokens are sampled; the debt is booked and the blocks go, in the engine's thread."""
        spec = next(spec for spec in self.specs if spec.sequence_id == sequence)
        assert spec.debt is not None
        self._pool.raise_promise(spec.debt.owner, spec.debt.blocks(first))
        self._pool.release(spec.owner)

    def live(self) -> set[SequenceId]:
        return {spec.sequence_id for spec in self.specs} - self.ended

    def emit(
        self,
        sequence: SequenceId,
        first: int,
        tokens: tuple[int, ...],
        reason: FinishReason | None = None,
        error: PdserveError | None = None,
    ) -> None:
        spec = next(spec for spec in self.specs if spec.sequence_id == sequence)
        is_last = reason is not None or error is not None
        if is_last:
            self.ended.add(sequence)
        if is_last and spec.sampling is not None:
            self._pool.release(spec.owner)
        self.sinks[sequence](
            SequenceOutput(
                sequence_id=sequence,
                num_computed=len(spec.token_ids),
                first_index=first,
                new_token_ids=tokens,
                text="".join(f"<{token}>" for token in tokens),
                finish_reason=reason,
                error=error,
                cached_tokens=0,
                started_at=0.0,
                prefill_ended_at=0.0,
                first_token_at=0.0,
            )
        )
        self._after()


class Rig:
    """A DecodeRole over a real pool."""

    def __init__(
        self, *outcomes: Outcome | str | None, reattach_s: float = 5.0, pool_blocks: int = POOL_BLOCKS
    ) -> None:
        self.pool = KvPool(KvLayout(1, 1, 8, "float32"), pool_blocks, np.zeros(pool_blocks, np.uint64))
        self.handoffs = FakeHandoffs(self.pool, outcomes)
        self.copies: list[tuple[BlockId, BlockId]] = []
        self.engine = FakeDispatcher(self.pool)
        self.perf = PerfModel()
        record = WorkerRecord(
            worker=WorkerId("decode-0"),
            incarnation=Incarnation("d1"),
            role=Role.DECODE,
            model="m",
            schema="00",
            endpoint="127.0.0.1:1",
            pid=7,
            context_tokens=4096,
            vocab_size=100,
            dtype="float32",
            pool_blocks=pool_blocks,
            role_weight=0.0,
        )
        self.first_tokens: list[DecodeRequest] = []
        prefixes = PrefixFetch(
            record=lambda: record,
            pool=self.pool,
            handoffs=self.handoffs,  # type: ignore[arg-type]
            ways=dict,
            perf=self.perf,
            chunk_tokens=CHUNK_TOKENS,
            clock=MonotonicClock(),
        )
        self.role = DecodeRole(
            record=lambda: record,
            pool=self.pool,
            copy_blocks=self.copy,
            prepare=TextPreparation(self.compile).prepare,
            dispatcher=self.engine,  # type: ignore[arg-type]
            handoffs=self.handoffs,  # type: ignore[arg-type]
            prefixes=prefixes,
            engine_config=EngineConfig(headroom_tokens=HEADROOM),
            session_config=SessionConfig(reattach_s=reattach_s),
            clock=MonotonicClock(),
            observer=ignore,
            first_token=self.first_tokens.append,
        )
        self.link = SessionLink("router")

    def compile(self, constraint: Constraint) -> None:
        """Constraints with a source of "wrong" are that."""
        if constraint.source == "wrong":
            raise InvalidRequest("the constraint is wrong")

    def copy(self, sources: Sequence[BlockId], targets: Sequence[BlockId]) -> None:
        assert not self.engine.live(), "a sequence lives that could write what is copied"
        self.copies += zip(sources, targets, strict=True)

    def open(
        self,
        name: str = "r",
        tokens: int = 70,
        *,
        max_tokens: int = 1000,
        candidates: Sequence[str] = ("prefill-0", "prefill-1", "decode-0"),
        deadline: float | None = None,
        n: int = 1,
        constraint: Constraint | None = None,
        prefix: PrefixHolder | None = None,
    ) -> worker_pb2.Replace | None:
        prompt = tuple(range(tokens))
        ask = DecodeAsk(
            request_id=RequestId(name),
            token_ids=prompt,
            chain=chain(ROOT, prompt),
            namespace=ROOT,
            sampling=SamplingParams(max_tokens=max_tokens, seed=SEED, n=n, constraint=constraint),
            candidates=tuple(PrefillCandidate(worker, "p1", "127.0.0.1:2") for worker in candidates),
            deadline=deadline,
            prefix=prefix,
        )
        return self.role.open(self.link, ask)

    async def until_submitted(self) -> SequenceSpec:
        async with asyncio.timeout(5):
            await self.engine.submitted.wait()
        return self.engine.specs[-1]

    async def prefill_prompt(self) -> None:
        """What the engine does for a prompt whose choices wait for it, until it has them."""
        (prompt,) = (spec for spec in self.engine.specs if spec.sampling is None)
        self.pool.allocate(prompt.owner, blocks_for(len(prompt.token_ids)))
        self.engine.submitted.clear()
        self.engine.emit(prompt.sequence_id, 0, (), FinishReason.LENGTH)
        await self.until_submitted()

    async def until_ended(self) -> None:
        async with asyncio.timeout(5):
            while self.role.unfinished():
                await asyncio.sleep(0)

    def items(self) -> list[worker_pb2.FrameItem]:
        """All that was queued for the router, in order."""
        self.link.flush()
        queued = list(self.link._messages)
        return [item for message in queued for item in message.frame.items]

    def assert_nothing_left(self) -> None:
        counts = self.pool.counts()
        assert (counts.promised, counts.held, counts.reserved, counts.loading) == (0, 0, 0, 0)
        assert self.pool.owners() == ()
        self.pool.check_integrity()
