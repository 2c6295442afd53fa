"""Peers that break the rules of the conversation: nothing is served to them, nothing is believed."""

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest
from handoff_rig import LAYOUT, SCHEMA, Rig

from pdserve.core.channel_options import CHANNEL_OPTIONS
from pdserve.core.lifecycle import Lifecycle
from pdserve.core.types import BlockId, HandoffId, Incarnation, RequestId, WorkerId
from pdserve.kvtransfer.handoff import wire
from pdserve.kvtransfer.handoff.consumer import HandoffPeer, NotServed
from pdserve.kvtransfer.handoff.messages import Chunk, FilledReply, OpenedReply, OpenRequest, Rejection
from pdserve.kvtransfer.handoff.states import Outcome, ReleaseStatus
from pdserve.kvtransfer.names import chain, namespace
from pdserve.kvtransfer.transports.base import Grant, Offer, Segment
from pdserve.proto import handoff_pb2 as pb
from pdserve.proto import handoff_pb2_grpc

TOKENS = tuple(range(40))


def open_request(**changes: object) -> OpenRequest:
    fields: dict[str, object] = {
        "handoff": HandoffId("raw-1"),
        "request": RequestId("raw"),
        "schema": SCHEMA,
        "layout": LAYOUT,
        "token_ids": TOKENS,
        "chain": chain(namespace(SCHEMA), TOKENS),
        "remaining_s": None,
        "transports": ("shm", "tcp"),
        "digest": True,
        "decode_worker": WorkerId("decode-0"),
        "decode_incarnation": Incarnation("decode-first"),
        "prefill_incarnation": Incarnation("prefill-first"),
    }
    return OpenRequest(**(fields | changes))  # type: ignore[arg-type]


async def converse(
    rig: Rig, first: pb.DecodeMessage, *rest: pb.DecodeMessage, after: str = "filled"
) -> list[pb.PrefillMessage]:
    """Send `first`, and `rest` once P has said `after`; returns all that P says, heartbeats left out."""
    said: list[pb.PrefillMessage] = []
    async with grpc.aio.insecure_channel(f"127.0.0.1:{rig.port}", options=CHANNEL_OPTIONS) as channel:
        call = handoff_pb2_grpc.HandoffStub(channel).Handoff()
        await call.write(first)
        async for message in call:
            kind = message.WhichOneof("message")
            if kind != "heartbeat":
                said.append(message)
            if kind == after:
                for late in rest:
                    await call.write(late)
    return said


def kinds(said: list[pb.PrefillMessage]) -> list[str | None]:
    return [message.WhichOneof("message") for message in said]


async def test_a_release_before_filled_is_never_answered_ok() -> None:
    async with Rig() as rig:
        held: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        rig.filler.gate = lambda step: asyncio.shield(held) if step else None
        said = await converse(rig, wire.pack_open(open_request()), wire.pack_release(), after="chunk")
        assert kinds(said) == ["opened", "chunk", "aborted"]
        await rig.at_rest()
        assert rig.filler.ended


@pytest.mark.parametrize(
    "segment",
    [
        Segment(BlockId(31), 0, BlockId(0), 16),
        Segment(BlockId(0), 99, BlockId(0), 16),
    ],
    ids=["a block that is not exposed", "another generation"],
)
async def test_a_grant_names_only_exposed_blocks(segment: Segment) -> None:
    async with Rig() as rig:
        grant = wire.pack_grant(Grant(HandoffId("raw-1"), 1, 0, (segment,)), "shm")
        said = await converse(rig, wire.pack_open(open_request()), grant)
        assert kinds(said)[-1] == "aborted"
        await rig.at_rest()


async def test_a_grant_for_a_chunk_that_is_not_there_is_refused() -> None:
    async with Rig() as rig:
        grant = wire.pack_grant(Grant(HandoffId("raw-1"), 1, 7, ()), "shm")
        said = await converse(rig, wire.pack_open(open_request()), grant)
        assert kinds(said)[-1] == "aborted"
        await rig.at_rest()


async def test_a_transport_that_d_did_not_accept_is_refused() -> None:
    async with Rig() as rig:
        grant = wire.pack_grant(Grant(HandoffId("raw-1"), 1, 0, ()), "tcp")
        said = await converse(rig, wire.pack_open(open_request(transports=("shm",))), grant)
        assert [offer.transport for offer in said[0].opened.offers] == ["shm"]
        assert kinds(said)[-1] == "aborted"
        await rig.at_rest()


async def test_a_second_open_ends_the_conversation() -> None:
    async with Rig() as rig:
        opening = wire.pack_open(open_request())
        said = await converse(rig, opening, opening)
        assert kinds(said)[-1] == "aborted"
        await rig.at_rest()


@pytest.mark.parametrize(
    "broken",
    [
        open_request(chain=()),
        open_request(token_ids=(), chain=()),
    ],
    ids=["too few names", "no positions"],
)
async def test_an_open_that_makes_no_sense_is_rejected(broken: OpenRequest) -> None:
    async with Rig() as rig:
        said = await converse(rig, wire.pack_open(broken))
        assert kinds(said) == ["rejected"]
        await rig.at_rest()


async def test_an_open_that_cannot_be_read_is_rejected() -> None:
    async with Rig() as rig:
        message = wire.pack_open(open_request())
        message.open.token_ids = b"123"
        message.open.representation.dtype = "int3"
        assert kinds(await converse(rig, message)) == ["rejected"]
        message.open.representation.tp = 2
        said = await converse(rig, message)
        assert "tensor parallel" in said[0].rejected.reason


async def test_one_handoff_id_is_one_handoff() -> None:
    """The second stream is refused, and its end does not touch what the first one has."""
    async with Rig() as rig:
        opening = wire.pack_open(open_request())
        first = asyncio.create_task(converse(rig, opening, after="nothing"))
        await rig.prefill_trail.wait(Lifecycle.PREFILL_ENDED)
        assert kinds(await converse(rig, opening)) == ["rejected"]
        assert rig.p.pool.counts().held == 3
        assert rig.servicer.in_flight() == 1
        rig.servicer.abort_all("enough")
        assert kinds(await first) == ["opened", "chunk", "chunk", "filled", "aborted"]
        await rig.at_rest()


ADDRESS = {
    "host": "127.0.0.1",
    "port": "",
    "token": "00" * 16,
    "num_blocks": "8",
    "layout": LAYOUT.fingerprint().hex(),
}
"""Of no exporter; `lied_to` puts a real one's here."""


class LyingP(handoff_pb2_grpc.HandoffServicer):
    """Says what it is told to, whatever D says."""

    def __init__(self, *script: pb.PrefillMessage) -> None:
        self._script = script

    async def Handoff(  # type: ignore[override]
        self, request_iterator: AsyncIterator[pb.DecodeMessage], context: grpc.aio.ServicerContext
    ) -> None:
        async for _ in request_iterator:
            for message in self._script:
                await context.write(message)
            return


async def lied_to(*script: pb.PrefillMessage) -> NotServed:
    async with Rig("tcp") as rig:
        real = next(exporter.offer() for exporter in rig.exporters if exporter.transport == "tcp")
        for message in script:
            for offer in message.opened.offers:
                offer.parameters.update(real.parameters)
        server = grpc.aio.server()
        handoff_pb2_grpc.add_HandoffServicer_to_server(LyingP(*script), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        peer = HandoffPeer(WorkerId("prefill-0"), Incarnation("prefill-first"), f"127.0.0.1:{port}")
        result = await rig.handoffs.fetch(rig.ask(range(41)), peer)
        await rig.at_rest()
        await server.stop(None)
        assert isinstance(result, NotServed)
        assert rig.d.pool.counts().free == rig.d.num_blocks
        return result


def opened(incarnation: str = "prefill-first") -> pb.PrefillMessage:
    reply = OpenedReply(
        estimate_s=0.1,
        queue_position=0,
        offers=(Offer("tcp", ADDRESS),),
        worker=WorkerId("prefill-0"),
        incarnation=Incarnation(incarnation),
        pid=1,
        cached_blocks=0,
    )
    return wire.pack_opened(reply)


def chunk(seq: int = 0, first: int = 0, blocks: int = 2, valid: int = 16) -> pb.PrefillMessage:
    ids = tuple(BlockId(block) for block in range(blocks))
    return wire.pack_chunk(Chunk(seq, first, ids, (1,) * blocks, valid, b"\0" * 64 * blocks))


FILLED = wire.pack_filled(FilledReply(1, 40, 0.0, 0.0, 0))


@pytest.mark.parametrize(
    "script",
    [
        [wire.pack_released(ReleaseStatus.OK)],
        [opened(), wire.pack_released(ReleaseStatus.OK)],
        [opened(), opened()],
        [opened("prefill-other")],
        [chunk()],
        [opened(), chunk(seq=1)],
        [opened(), chunk(first=1)],
        [opened(), chunk(blocks=4, valid=8)],
        [opened(), chunk(valid=3)],
        [opened(), FILLED],
        [opened(), chunk(), FILLED],
        [pb.PrefillMessage()],
        [opened(), pb.PrefillMessage(chunk=pb.HandoffChunk(blocks=[1], generations=[1, 2]))],
        [opened(), pb.PrefillMessage(chunk=pb.HandoffChunk(blocks=[1], generations=[1], digests=b"short"))],
        [pb.PrefillMessage(released=pb.HandoffReleased(status="perhaps"))],
    ],
    ids=[
        "released at once",
        "released before anything was fetched",
        "opened twice",
        "another incarnation",
        "a chunk before opened",
        "a chunk out of order",
        "a gap between chunks",
        "more blocks than the prompt has",
        "a last block of another length",
        "filled without chunks",
        "filled with too few blocks",
        "an empty message",
        "generations that do not fit",
        "digests that do not fit",
        "an unknown status",
    ],
)
async def test_d_believes_nothing_that_is_out_of_order(script: list[pb.PrefillMessage]) -> None:
    assert (await lied_to(*script)).reason is Outcome.PROTOCOL


async def test_a_stream_that_ends_before_its_time_is_lost() -> None:
    assert (await lied_to(opened())).reason is Outcome.LOST


async def test_no_common_transport_is_said() -> None:
    held = opened()
    del held.opened.offers[:]
    result = await lied_to(held, *[wire.pack_prefill_heartbeat(i) for i in range(3)])
    assert result.reason is Outcome.LOST


async def test_a_rejection_carries_when_to_come_back() -> None:
    result = await lied_to(wire.pack_rejected(Rejection(Outcome.REJECTED, "busy", 1.5)))
    assert result == NotServed(Outcome.REJECTED, "busy", 1.5)
