"""A token stream: nothing lost, nothing twice, bounded."""

import asyncio

import pytest

from pdserve.core.errors import InternalError, WorkerLost
from pdserve.proto import worker_pb2
from pdserve.router.token_stream import TokenStream


def item(first: int, count: int = 1, finish: str = "", choice: int = 0) -> worker_pb2.FrameItem:
    ids = range(100 + first, 100 + first + count)
    return worker_pb2.FrameItem(
        request_id="r", choice=choice, first_index=first, token_ids=ids, finish_reason=finish
    )


async def read(stream: TokenStream) -> list[int]:
    got = await stream.get()
    assert isinstance(got, worker_pb2.FrameItem)
    return list(got.token_ids)


async def test_what_was_received_is_dropped_when_it_comes_again() -> None:
    stream = TokenStream(10)
    for first in (0, 1, 0, 1, 2):
        assert stream.put(item(first))
    assert [await read(stream) for _ in range(3)] == [[100], [101], [102]]
    assert stream.next_index == (3,)


async def test_missing_and_overlapping_tokens_are_refused() -> None:
    stream = TokenStream(10)
    stream.put(item(0, 2))
    with pytest.raises(InternalError, match="token 2 of choice 0 was expected"):
        stream.put(item(3))
    with pytest.raises(InternalError, match="token 2 of choice 0 was expected"):
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


async def test_each_choice_has_its_own_count_and_all_of_them_end_the_request() -> None:
    stream = TokenStream(10, choices=3)
    assert stream.put(item(0, 2, choice=1))
    assert stream.put(item(0, 1, choice=0))
    assert stream.next_index == (1, 2, 0)
    with pytest.raises(InternalError, match="token 1 of choice 0 was expected"):
        stream.put(item(2, 1, choice=0))
    for choice in (2, 0, 1):
        assert not stream.ended
        assert stream.put(item(stream.next_index[choice], 1, finish="stop", choice=choice))
    assert stream.ended
    assert [len(await read(stream)) for _ in range(5)] == [2, 1, 1, 1, 1]


async def test_an_end_that_comes_again_is_told_once() -> None:
    """As after an attach, which repeats every choice's last item, also one without a token."""
    stream = TokenStream(10, choices=2)
    stream.put(item(0, 1))
    assert stream.put(item(1, 0, finish="stop"))
    assert stream.put(item(1, 0, finish="stop"))
    assert stream.put(item(0, 2, finish="length", choice=1))
    assert [await read(stream) for _ in range(3)] == [[100], [], [100, 101]]
    assert stream.ended


async def test_a_choice_that_was_not_asked_for_is_a_defect() -> None:
    with pytest.raises(InternalError, match="2 choices"):
        TokenStream(10, choices=2).put(item(0, choice=2))


async def test_a_failure_ends_all_choices() -> None:
    stream = TokenStream(10, choices=2)
    stream.put(item(0))
    stream.put(worker_pb2.FrameItem(request_id="r", failure=worker_pb2.Failure(code=14)))
    assert stream.ended


async def test_every_choice_has_its_share_of_the_bound() -> None:
    stream = TokenStream(3, choices=2)
    assert stream.put(item(0, 6))
    assert not stream.put(item(0, 1, choice=1))
