"""D's end of a session: whole steps in one frame, last words written, a deaf router cut off."""

import asyncio

from pdserve.proto import worker_pb2
from pdserve.workers.session_link import MAX_BACKLOG, SessionLink


def item(token: int) -> worker_pb2.FrameItem:
    return worker_pb2.FrameItem(request_id="r", token_ids=[token])


def beat(progress: int) -> worker_pb2.SessionResponse:
    return worker_pb2.SessionResponse(heartbeat=worker_pb2.WorkerHeartbeat(progress=progress))


async def written(link: SessionLink) -> list[worker_pb2.SessionResponse]:
    """All that the writer would write until the link ends."""
    messages = []
    while (message := await link.next_message()) is not None:
        messages.append(message)
    return messages


async def test_all_items_of_a_step_travel_in_one_frame_in_order() -> None:
    link = SessionLink("router")
    for token in (1, 2):
        link.add_item(item(token))
    link.flush()
    link.flush()  # nothing new: no empty frame
    link.send(beat(1))
    link.close()
    frame, heartbeat = await written(link)
    assert [list(i.token_ids) for i in frame.frame.items] == [[1], [2]]
    assert heartbeat.heartbeat.progress == 1


async def test_what_was_queued_before_the_close_is_written_and_nothing_after_it() -> None:
    link = SessionLink("router")
    link.send(beat(1))
    link.add_item(item(7))
    link.close()
    assert link.broken
    link.send(beat(2))
    link.add_item(item(8))
    link.flush()
    heartbeat, frame = await written(link)
    assert heartbeat.heartbeat.progress == 1
    assert [list(i.token_ids) for i in frame.frame.items] == [[7]]


async def test_a_cut_loses_what_was_queued_and_wakes_the_writer() -> None:
    link = SessionLink("router")
    waiting = asyncio.create_task(link.next_message())
    await asyncio.sleep(0)
    link.add_item(item(7))
    link.cut()
    async with asyncio.timeout(5):
        assert await waiting is None
    link.close()
    assert await written(link) == []


async def test_a_router_that_does_not_read_is_cut_off_before_memory_fills() -> None:
    link = SessionLink("router")
    for number in range(MAX_BACKLOG):
        link.send(beat(number))
    assert not link.broken
    link.send(beat(0))
    assert link.broken
    assert await written(link) == []
