"""The small parts of the shells: the watch, the export queue, and messages that survive the wire."""

import pytest
from handoff_rig import LAYOUT

from pdserve.core.errors import InternalError
from pdserve.core.types import BlockId, HandoffId, Incarnation, WorkerId
from pdserve.kvtransfer.handoff import wire
from pdserve.kvtransfer.handoff.ask import FetchedPrefix
from pdserve.kvtransfer.handoff.export_queue import ExportQueue
from pdserve.kvtransfer.handoff.messages import Chunk, FilledReply, OpenedReply, Rejection, offers_among
from pdserve.kvtransfer.handoff.states import Outcome, ReleaseStatus
from pdserve.kvtransfer.handoff.watch import PeerWatch
from pdserve.kvtransfer.transports.base import Grant, Offer, Segment
from pdserve.proto import handoff_pb2 as pb


def test_silence_is_suspect_after_its_bound() -> None:
    watch = PeerWatch(3.0, 10.0)
    for now in (11.0, 12.0, 13.0):
        assert watch.suspicion(now, working=True) is None
    assert "said nothing for 3.5 s" in (watch.suspicion(13.5, working=True) or "")


def test_any_message_ends_the_silence() -> None:
    watch = PeerWatch(3.0, 10.0)
    for now in (11.0, 12.0, 13.0, 14.0, 15.0):
        watch.heard(now)
        assert watch.suspicion(now, working=False) is None


def test_work_without_progress_is_suspect() -> None:
    watch = PeerWatch(3.0, 10.0)
    for now in (11.0, 12.0, 13.0, 14.0):
        watch.progressed(7, now)
        assert watch.suspicion(now, working=True) is None
    watch.progressed(7, 14.5)
    assert "no progress for 3.5 s" in (watch.suspicion(14.5, working=True) or "")
    watch.progressed(8, 15.0)
    assert watch.suspicion(15.0, working=True) is None


def test_no_work_needs_no_progress() -> None:
    watch = PeerWatch(3.0, 10.0)
    for now in range(11, 30):
        watch.progressed(7, now)
        assert watch.suspicion(now, working=False) is None


def test_a_pause_of_our_own_is_nobodys_fault() -> None:
    watch = PeerWatch(3.0, 10.0)
    assert watch.suspicion(60.0, working=True) is None
    assert watch.suspicion(61.0, working=True) is None
    assert watch.suspicion(62.0, working=True) is None
    assert watch.suspicion(63.5, working=True) is not None


def test_the_export_queue_admits_in_order_and_never_lends_too_much() -> None:
    queue, admitted = ExportQueue(10), []
    for name, blocks in (("a", 6), ("b", 6), ("c", 2)):
        queue.enter(HandoffId(name), blocks, lambda name=name: admitted.append(name))
        queue.check_integrity()
    assert admitted == ["a"]  # c would fit, but came after b
    assert len(queue) == 2
    queue.leave(HandoffId("a"))
    assert admitted == ["a", "b", "c"]
    assert queue.lent == 8
    queue.leave(HandoffId("b"))
    queue.leave(HandoffId("b"))
    queue.leave(HandoffId("c"))
    assert (queue.lent, len(queue)) == (0, 0)


def test_who_leaves_the_queue_lets_the_next_one_in() -> None:
    queue, admitted = ExportQueue(10), []
    queue.enter(HandoffId("a"), 9, lambda: admitted.append("a"))
    queue.enter(HandoffId("b"), 5, lambda: admitted.append("b"))
    queue.enter(HandoffId("c"), 1, lambda: admitted.append("c"))
    queue.leave(HandoffId("b"))
    assert admitted == ["a", "c"]


def test_the_export_queue_notices_wrong_books() -> None:
    queue = ExportQueue(4)
    queue.enter(HandoffId("a"), 4, lambda: None)
    queue.capacity = 3
    with pytest.raises(InternalError, match="4 blocks are lent"):
        queue.check_integrity()


def test_grants_survive_the_wire() -> None:
    grant = Grant(HandoffId("h"), 7, 3, (Segment(BlockId(1), 2, BlockId(3), 16),))
    message = wire.pack_grant(grant, "tcp")
    assert message.grant.transport == "tcp"
    assert wire.unpack_grant(message.grant, HandoffId("h")) == grant


@pytest.mark.parametrize("digests", [None, bytes(range(64)) * 2])
def test_chunks_survive_the_wire(digests: bytes | None) -> None:
    chunk = Chunk(1, 4, (BlockId(9), BlockId(8)), (3, 2**63), 5, digests)
    assert wire.unpack_chunk(wire.pack_chunk(chunk).chunk, None if digests is None else 64) == chunk
    assert chunk.end == 6


def test_answers_survive_the_wire() -> None:
    opened = OpenedReply(
        estimate_s=0.5,
        queue_position=2,
        offers=(Offer("shm", {"pid": "1"}), Offer("tcp", {"host": "h"})),
        worker=WorkerId("p"),
        incarnation=Incarnation("i"),
        pid=3,
        cached_blocks=4,
    )
    assert wire.unpack_opened(wire.pack_opened(opened).opened) == opened
    for prefix in (None, FetchedPrefix(WorkerId("d"), 2)):
        filled = FilledReply(3, 40, 0.25, 0.5, 16, prefix)
        assert wire.unpack_filled(wire.pack_filled(filled).filled) == filled
    for status in ReleaseStatus:
        assert wire.unpack_released(wire.pack_released(status).released) is status


@pytest.mark.parametrize(
    "rejection",
    [
        Rejection(Outcome.REJECTED, "busy", 1.5),
        Rejection(Outcome.REJECTED, "full"),
        Rejection(Outcome.REJECTED, "holds nothing", held_blocks=0),
        Rejection(Outcome.SCHEMA, "other"),
    ],
)
def test_rejections_survive_the_wire(rejection: Rejection) -> None:
    assert wire.unpack_rejected(wire.pack_rejected(rejection).rejected) == rejection


@pytest.mark.parametrize("outcome", ["", "cancelled", "no such"])
def test_a_rejection_says_which_kind_it_is(outcome: str) -> None:
    with pytest.raises(ValueError):
        wire.unpack_rejected(pb.HandoffRejected(reason="busy", outcome=outcome))


def test_offers_are_cut_to_what_was_asked() -> None:
    offers = [Offer("shm", {}), Offer("tcp", {})]
    assert offers_among(offers, ["tcp"]) == (offers[1],)
    assert LAYOUT.segments_per_block == 8
