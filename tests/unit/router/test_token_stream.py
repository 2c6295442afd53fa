"""A token stream: nothing lost, nothing twice, bounded."""

import asyncio

import pytest

from pdserve.core.errors import InternalError, WorkerLost
from pdserve.proto import worker_pb2
from pdserve.router.token_stream import TokenStream


def item(first: int, count: int = 1, finish: str = "") -> worker_pb2.FrameItem:
    ids = range(100 + first, 100 + first + count)
    return worker_pb2.FrameItem(request_id="r", first_index=first, token_ids=ids, finish_reason=finish)


async def read(stream: TokenStream) -> list[int]:
    got = await stream.get()
    assert isinstance(got, worker_pb2.FrameItem)
    return list(got.token_ids)


async def test_what_was_received_is_dropped_when_it_comes_again() -> None:
    stream = TokenStream(10)
    for first in (0, 1, 0, 1, 2):
        assert stream.put(item(first))
    assert [await read(stream) for _ in range(3)] == [[100], [101], [102]]
    assert stream.next_index == 3


async def test_missing_and_overlapping_tokens_are_refused() -> None:
    stream = TokenStream(10)
    stream.put(item(0, 2))
    with pytest.raises(InternalError, match="token 2 was expected"):
        stream.put(item(3))
    with pytest.raises(InternalError, match="token 2 was expected"):
        stream.put(item(1, 2))


async def test_an_end_without_tokens_is_news() -> None:
    stream = TokenStream(10)
    stream.put(item(0, 2))
    assert stream.put(item(2, 0, finish="stop"))
    await read(stream)
    last = await stream.get()
    assert isinstance(last, worker_pb2.FrameItem)
    assert last.finish_reason == "stop"


async def test_a_failure_needs_no_index() -> None:
    stream = TokenStream(10)
    stream.put(item(0, 2))
    assert stream.put(worker_pb2.FrameItem(request_id="r", failure=worker_pb2.Failure(code=14)))


async def test_the_bound_counts_unread_tokens() -> None:
    stream = TokenStream(3)
    assert stream.put(item(0, 3))
    assert not stream.put(item(3))
    await read(stream)
    assert stream.put(item(3, 3))


async def test_an_error_comes_after_what_was_received() -> None:
    stream = TokenStream(10)
    stream.put(item(0))
    stream.fail(WorkerLost("gone"))
    assert await read(stream) == [100]
    with pytest.raises(WorkerLost):
        await stream.get()


async def test_a_discarding_error_comes_at_once() -> None:
    stream = TokenStream(10)
    stream.put(item(0))
    stream.fail(WorkerLost("gone"), discard=True)
    with pytest.raises(WorkerLost):
        await stream.get()


async def test_a_waiting_reader_is_woken() -> None:
    stream = TokenStream(10)
    reading = asyncio.create_task(read(stream))
    await asyncio.sleep(0)
    assert not reading.done()
    stream.put(item(0))
    assert await reading == [100]


async def test_a_replace_reaches_the_reader() -> None:
    stream = TokenStream(10)
    stream.refuse(worker_pb2.Replace(request_id="r", reason="full"))
    got = await stream.get()
    assert isinstance(got, worker_pb2.Replace)
    assert not stream.heard
