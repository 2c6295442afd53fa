"""Who may still claim a request at D, and that nothing of it stays once nobody may."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping

import numpy as np
import pytest
from fake_engine import FakeEngine, output, settle

from pdserve.core.clock import MonotonicClock
from pdserve.core.config import EngineConfig, SessionConfig
from pdserve.core.errors import ContextTooLong, GrpcCode, WorkerLost
from pdserve.core.lifecycle import Lifecycle
from pdserve.core.perfmodel import PerfModel
from pdserve.core.types import FinishReason, Incarnation, RequestId, Role, SamplingParams, WorkerId
from pdserve.core.worker_record import WorkerRecord
from pdserve.kvtransfer.handoff.prefix_fetch import PrefixFetch
from pdserve.kvtransfer.names import chain
from pdserve.kvtransfer.pool.layout import KvLayout
from pdserve.kvtransfer.pool.pool import KvPool
from pdserve.proto import worker_pb2
from pdserve.workers.decode_request import DecodeAsk, PrefillCandidate
from pdserve.workers.decode_role import DecodeRole
from pdserve.workers.dispatch import OutputDispatcher
from pdserve.workers.session_link import SessionLink
from pdserve.workers.text_preparation import TextPreparation

ROOT = b"n" * 16
R = RequestId("r")
POOL_BLOCKS = 8
RECORD = WorkerRecord(
    worker=WorkerId("mixed-0"),
    incarnation=Incarnation("one"),
    role=Role.MIXED,
    model="m",
    schema="00",
    endpoint="127.0.0.1:1",
    pid=7,
    context_tokens=4096,
    vocab_size=100,
    dtype="float32",
    pool_blocks=POOL_BLOCKS,
    role_weight=0.5,
)


class Rig:
    """A DecodeRole that prefills by itself, over an engine that answers when it is told to."""

    def __init__(self, reattach_s: float = 60.0) -> None:
        self.pool = KvPool(KvLayout(1, 1, 8, "float32"), POOL_BLOCKS, np.zeros(POOL_BLOCKS, np.uint64))
        self.engine = FakeEngine()
        self.dispatcher = OutputDispatcher(self.engine)
        self.dispatcher.start()
        self.broken_observer = False
        prefixes = PrefixFetch(
            record=lambda: RECORD,
            pool=self.pool,
            handoffs=None,  # type: ignore[arg-type]  # nobody is named who holds more
            ways=dict,
            perf=PerfModel(),
            chunk_tokens=64,
            clock=MonotonicClock(),
        )
        self.role = DecodeRole(
            record=lambda: RECORD,
            pool=self.pool,
            copy_blocks=lambda sources, targets: None,
            prepare=TextPreparation(lambda constraint: None).prepare,
            dispatcher=self.dispatcher,
            handoffs=None,  # type: ignore[arg-type]  # the only candidate is this worker
            prefixes=prefixes,
            engine_config=EngineConfig(headroom_tokens=64),
            session_config=SessionConfig(reattach_s=reattach_s),
            clock=MonotonicClock(),
            observer=self.observe,
            first_token=lambda request: None,
        )
        self.link = SessionLink("router")

    def observe(self, event: Lifecycle, facts: Mapping[str, object]) -> None:
        if self.broken_observer:
            raise RuntimeError("a defect")

    def open(self, name: str = R, tokens: int = 20, max_tokens: int = 8) -> worker_pb2.Replace | None:
        prompt = tuple(range(tokens))
        candidates = (PrefillCandidate(RECORD.worker, RECORD.incarnation, RECORD.endpoint),)
        sampling = SamplingParams(max_tokens=max_tokens)
        ask = DecodeAsk(RequestId(name), prompt, chain(ROOT, prompt), ROOT, sampling, candidates, None)
        return self.role.open(self.link, ask)

    async def running(self) -> None:
        """Open R and see its first token."""
        assert self.open() is None
        await settle()
        self.engine.step(output("r/0", tokens=(5,)))
        await settle()
        assert [list(item.token_ids) for item in self.heard()] == [[5]]

    async def engine_let_go(self) -> None:
        self.engine.step(output("r/0", first=1, reason=FinishReason.ABORT))
        await settle()

    def heard(self) -> list[worker_pb2.FrameItem]:
        """What the router got since the last call."""
        self.link.flush()
        items = [item for message in self.link._messages for item in message.frame.items]
        self.link._messages.clear()
        return items

    def assert_nothing_left(self) -> None:
        assert self.role.in_flight() == 0
        assert not self.link.requests
        assert self.pool.owners() == ()
        self.pool.check_integrity()


async def test_what_a_router_cancelled_is_forgotten_without_a_word_or_an_acknowledgement() -> None:
    rig = Rig()
    await rig.running()
    rig.role.cancel(R, tell=False)
    assert rig.pool.counts().promised > 0  # the engine may still write
    await rig.engine_let_go()
    assert rig.heard() == []
    rig.assert_nothing_left()


async def test_an_id_is_free_again_only_when_its_last_user_has_let_go() -> None:
    rig = Rig()
    await rig.running()
    rig.role.cancel(R, tell=False)
    replace = rig.open()
    assert replace is not None
    assert "still ending" in replace.reason
    rig.role.attach(rig.link, R, [0])
    (refusal,) = rig.heard()
    assert refusal.failure.retriable
    await rig.engine_let_go()
    assert rig.open() is None
    await settle()
    rig.engine.step(output("r/0", tokens=(6,), reason=FinishReason.LENGTH))
    await settle()
    assert [list(item.token_ids) for item in rig.heard()] == [[6]]  # nothing of the first one
    rig.role.acknowledge(R)
    rig.assert_nothing_left()


async def test_a_cancel_behind_the_end_is_its_acknowledgement() -> None:
    rig = Rig()
    await rig.running()
    rig.engine.step(output("r/0", tokens=(6,), first=1, reason=FinishReason.LENGTH))
    await settle()
    assert rig.role.in_flight() == 1
    rig.role.cancel(R, tell=False)
    rig.assert_nothing_left()


async def test_no_request_of_a_void_incarnation_can_be_claimed() -> None:
    rig = Rig()
    await rig.running()
    rig.engine.step(output("r/0", tokens=(6,), first=1, reason=FinishReason.LENGTH))
    rig.open("other")
    await settle()
    rig.heard()
    rig.role.void(WorkerLost("fenced"))
    assert rig.role.in_flight() == 1  # the ended one is gone; the engine has the other
    for name in (R, RequestId("other")):
        rig.role.attach(rig.link, name, [0])
    assert [item.failure.code for item in rig.heard()] == [int(GrpcCode.UNAVAILABLE)] * 2
    rig.engine.step(output("other/0", reason=FinishReason.ABORT))
    await settle()
    (failure,) = rig.heard()
    assert "fenced" in failure.failure.message
    rig.assert_nothing_left()


async def test_what_ends_while_nobody_listens_waits_for_its_router_and_then_goes(
    leap: Callable[[float], Awaitable[None]],
) -> None:
    rig = Rig(reattach_s=60.0)
    await rig.running()
    rig.role.detach(rig.link)
    rig.engine.step(output("r/0", tokens=(6,), first=1, reason=FinishReason.LENGTH))
    await settle()
    assert rig.role.unfinished() == 0
    rig.role.attach(rig.link, R, [1])
    assert [list(item.token_ids) for item in rig.heard()] == [[6]]
    rig.role.detach(rig.link)
    await leap(59.0)
    assert rig.role.in_flight() == 1
    await leap(1.0)
    rig.assert_nothing_left()


async def test_what_nobody_claimed_is_lost_and_not_cancelled() -> None:
    """Its client did not leave: should it still be there, it may try again."""
    rig = Rig(reattach_s=0.0)
    await rig.running()
    rig.role.detach(rig.link)
    async with asyncio.timeout(5):
        while not rig.engine.aborted:
            await asyncio.sleep(0.001)
    (request,) = rig.role._claims
    assert request.abort_reason is not None
    assert request.abort_reason.retriable
    await rig.engine_let_go()
    rig.assert_nothing_left()


@pytest.mark.parametrize("last", [False, True], ids=["in the middle", "at the end"])
async def test_a_defect_in_one_step_ends_that_request_alone(last: bool) -> None:
    rig = Rig()
    await rig.running()
    rig.open("other")
    await settle()
    rig.broken_observer = True
    reason = FinishReason.LENGTH if last else None
    rig.engine.step(output("r/0", tokens=(6,), first=1, reason=reason))
    await settle()
    rig.broken_observer = False
    if not last:
        assert rig.engine.aborted == ["r/0"]
        await rig.engine_let_go()
    (failure,) = rig.heard()
    assert (failure.request_id, failure.failure.code) == (R, int(GrpcCode.INTERNAL))
    rig.role.acknowledge(R)
    rig.engine.step(output("other/0", tokens=(7,), reason=FinishReason.LENGTH))
    await settle()
    assert [list(item.token_ids) for item in rig.heard()] == [[7]]
    rig.role.acknowledge(RequestId("other"))
    rig.assert_nothing_left()


async def test_an_engine_that_died_fails_every_request_and_gives_every_promise_back() -> None:
    rig = Rig()
    await rig.running()
    rig.open("other")
    await settle()
    rig.engine.die(OSError("the device is gone"))
    await settle()
    ends = rig.heard()
    assert {item.request_id for item in ends} == {"r", "other"}
    assert all("the device is gone" in item.failure.message for item in ends)
    rig.open("late")
    await settle()
    assert "the device is gone" in rig.heard()[0].failure.message
    for name in ("r", "other", "late"):
        rig.role.acknowledge(RequestId(name))
    rig.assert_nothing_left()


@pytest.mark.parametrize(("tokens", "max_tokens", "fits"), [(120, 9, True), (127, 2, True), (120, 10, False)])
async def test_what_fits_an_empty_pool_is_promised_and_what_does_not_is_never_just_replaced(
    tokens: int, max_tokens: int, fits: bool
) -> None:
    """8 blocks are 128 positions, and the last token of a completion takes none."""
    rig = Rig()
    if fits:
        assert rig.open(tokens=tokens, max_tokens=max_tokens) is None
        return
    with pytest.raises(ContextTooLong, match=r"need 9 KV blocks, .* has 8"):
        rig.open(tokens=tokens, max_tokens=max_tokens)
    rig.assert_nothing_left()
