import asyncio
import gc

import grpc
import pytest
from fake_inference import FakeInference, chunk, failing, first_chunk, hanging, playing

from pdserve.client import AsyncClient, ChatMessage, ModelInfo, RetryPolicy, StreamLost
from pdserve.core.errors import (
    Cancelled,
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    Overloaded,
    Unavailable,
    UnknownModel,
    WorkerLost,
)
from pdserve.core.types import FinishReason, Usage
from pdserve.proto import inference_pb2 as pb


async def ended(server: FakeInference) -> bool:
    """Whether one more call has ended at the server."""
    return await asyncio.to_thread(server.ended.acquire, timeout=20)


async def test_a_result_holds_all_that_was_streamed(server: FakeInference) -> None:
    async with AsyncClient(server.target) as client:
        result = await client.generate("hello", max_tokens=4)
    assert result.request_id == "r-1"
    assert result.token_ids == (7, 8, 9, 10)
    assert result.text == "<7><8><9><10>"
    assert result.finish_reason is FinishReason.LENGTH
    assert result.usage == Usage(prompt_tokens=5, completion_tokens=4, cached_tokens=2)
    assert (result.route.prefill_pid, result.route.decode_pid, result.route.transport) == (11, 12, "shm")
    assert result.attempts == 1
    assert result.duration_s >= result.ttft_s


async def test_the_ledger_is_closed_with_network_and_sums_to_the_ttft(server: FakeInference) -> None:
    async with AsyncClient(server.target) as client:
        result = await client.generate("hello")
    assert result.ledger.exposed_transfer == 6e-5
    assert result.ledger.network > 0
    assert result.ledger.total() == pytest.approx(result.ttft_s, abs=1e-12)


async def test_chunks_arrive_in_order_and_the_stream_then_has_the_result(server: FakeInference) -> None:
    async with AsyncClient(server.target) as client:
        stream = await client.generate("hello", stream=True)
        chunks = [piece async for piece in stream]
        assert [(c.first_index, c.token_ids) for c in chunks] == [(0, (7,)), (1, (8, 9)), (3, (10,))]
        assert [c.finish_reason for c in chunks] == [None, None, FinishReason.LENGTH]
        assert stream.result().token_ids == (7, 8, 9, 10)
        assert stream.result().text == "".join(c.text for c in chunks)


async def test_a_stream_has_no_result_before_its_end(server: FakeInference) -> None:
    async with AsyncClient(server.target) as client:
        stream = await client.generate("hello", stream=True)
        assert await stream.read() is not None
        with pytest.raises(InternalError, match="read the stream to its end"):
            stream.result()
        assert stream.partial.token_ids == (7,)


async def test_every_form_of_prompt_and_every_option_reaches_the_server(server: FakeInference) -> None:
    async with AsyncClient(server.target) as client:
        await client.generate("text", max_tokens=3, temperature=0.5, top_p=0.25, top_k=4, seed=2**40)
        chat = [ChatMessage("system", "be brief"), {"role": "user", "content": "hi"}]
        await client.generate(messages=chat, model="m", request_id="mine", ignore_eos=True)
        await client.generate(token_ids=[1, 2, 3])
    text, messages, ids = server.requests
    assert text.text == "text"
    assert (text.sampling.max_tokens, text.sampling.temperature, text.sampling.top_p) == (3, 0.5, 0.25)
    assert (text.sampling.top_k, text.sampling.seed) == (4, 2**40)
    assert [(m.role, m.content) for m in messages.chat.messages] == [("system", "be brief"), ("user", "hi")]
    assert (messages.model, messages.request_id, messages.sampling.ignore_eos) == ("m", "mine", True)
    assert not messages.sampling.HasField("temperature")
    assert list(ids.token_ids.ids) == [1, 2, 3]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({}, "exactly one"),
        ({"prompt": "a", "token_ids": [1]}, "prompt and token_ids"),
        ({"messages": []}, "at least one"),
        ({"messages": [{"role": "user"}]}, "role and content"),
        ({"token_ids": [-1]}, "cannot be encoded"),
        ({"prompt": "a", "max_tokens": -1}, "cannot be encoded"),
        ({"prompt": "a", "timeout": 0.0}, "above 0"),
        ({"prompt": "a", "timeout": float("nan")}, "above 0"),
        ({"messages": "hello"}, "a message is a str"),
    ],
)
async def test_a_wrong_request_is_refused_before_it_is_sent(
    server: FakeInference, arguments: dict[str, object], complaint: str
) -> None:
    async with AsyncClient(server.target) as client:
        with pytest.raises(InvalidRequest, match=complaint):
            await client.generate(**arguments)
    assert server.requests == []


async def test_an_unknown_keyword_is_a_type_error(server: FakeInference) -> None:
    async with AsyncClient(server.target) as client:
        with pytest.raises(TypeError, match="max_token"):
            await client.generate("a", max_token=3)


async def test_unavailable_before_the_first_chunk_is_tried_again(
    server: FakeInference, eager: RetryPolicy
) -> None:
    server.plays.extend([failing(grpc.StatusCode.UNAVAILABLE)] * 2)
    async with AsyncClient(server.target, retry=eager) as client:
        result = await client.generate("hello", request_id="mine")
    assert result.token_ids == (7, 8, 9, 10)
    assert result.attempts == 3
    assert [request.request_id for request in server.requests] == ["mine"] * 3
    assert result.ledger.total() == pytest.approx(result.ttft_s, abs=1e-12)


async def test_retries_are_bounded(server: FakeInference, eager: RetryPolicy) -> None:
    server.plays.extend([failing(grpc.StatusCode.UNAVAILABLE)] * 4)
    async with AsyncClient(server.target, retry=eager) as client:
        with pytest.raises(Unavailable, match="played UNAVAILABLE"):
            await client.generate("hello")
    assert len(server.requests) == 3


async def test_a_server_that_is_not_there_is_unavailable(server: FakeInference, eager: RetryPolicy) -> None:
    server.stop()
    async with AsyncClient(server.target, retry=eager) as client:
        with pytest.raises(Unavailable):
            await client.generate("hello")


async def test_what_the_server_marks_as_not_retriable_is_not_retried(
    server: FakeInference, eager: RetryPolicy
) -> None:
    server.plays.append(failing(grpc.StatusCode.UNAVAILABLE, retriable="false"))
    async with AsyncClient(server.target, retry=eager) as client:
        with pytest.raises(Unavailable) as caught:
            await client.generate("hello")
    assert not caught.value.retriable
    assert len(server.requests) == 1


async def test_a_wait_that_the_deadline_does_not_allow_is_not_begun(server: FakeInference) -> None:
    server.plays.append(failing(grpc.StatusCode.UNAVAILABLE, retry_after_s="3600"))
    async with AsyncClient(server.target) as client:
        with pytest.raises(Unavailable) as caught:
            await client.generate("hello", timeout=30)
    assert caught.value.retry_after_s == 3600
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.RESOURCE_EXHAUSTED, Overloaded),
        (grpc.StatusCode.INVALID_ARGUMENT, InvalidRequest),
        (grpc.StatusCode.NOT_FOUND, UnknownModel),
        (grpc.StatusCode.INTERNAL, InternalError),
        (grpc.StatusCode.UNKNOWN, InternalError),
        (grpc.StatusCode.CANCELLED, Cancelled),
    ],
)
async def test_other_errors_are_mapped_and_not_retried(
    server: FakeInference, eager: RetryPolicy, code: grpc.StatusCode, kind: type[Exception]
) -> None:
    server.plays.append(failing(code, retry_after_s="1.5"))
    async with AsyncClient(server.target, retry=eager) as client:
        with pytest.raises(kind, match="played") as caught:
            await client.generate("hello")
    assert caught.value.retry_after_s == 1.5
    assert len(server.requests) == 1


async def test_a_worker_lost_after_the_first_token_is_not_retried_and_keeps_the_tokens(
    server: FakeInference, eager: RetryPolicy
) -> None:
    chunks = first_chunk([7]), chunk(1, [8])
    server.plays.append(failing(grpc.StatusCode.UNAVAILABLE, *chunks, retriable="true"))
    async with AsyncClient(server.target, retry=eager) as client:
        with pytest.raises(WorkerLost) as caught:
            await client.generate("hello")
    lost = caught.value
    assert isinstance(lost, StreamLost)
    assert lost.retriable
    assert lost.partial.token_ids == (7, 8)
    assert lost.partial.text == "<7><8>"
    assert lost.partial.route.decode_pid == 12
    assert len(server.requests) == 1


async def test_a_broken_stream_raises_the_same_error_again(server: FakeInference) -> None:
    server.plays.append(failing(grpc.StatusCode.UNAVAILABLE, first_chunk([7])))
    async with AsyncClient(server.target) as client:
        stream = await client.generate("hello", stream=True)
        assert await stream.read() is not None
        for again in (stream.read, stream.read, stream.collect):
            with pytest.raises(StreamLost):
                await again()


async def test_the_time_left_goes_with_the_call_and_ends_it(server: FakeInference) -> None:
    async with AsyncClient(server.target, timeout=60) as client:
        await client.generate("hello", timeout=20)
        await client.generate("hello")
        short, default = server.time_left
        assert short is not None
        assert default is not None
        assert short < 25 < default < 65  # The wire rounds deadlines.
        server.plays.append(hanging(first_chunk([7])))
        with pytest.raises(DeadlineExceeded):
            await client.generate("hello", timeout=0.2)


async def test_leaving_the_loop_early_ends_the_call_at_the_server(server: FakeInference) -> None:
    server.plays.append(hanging(first_chunk([7]), chunk(1, [8])))
    async with AsyncClient(server.target) as client:
        stream = await client.generate("hello", stream=True)
        async for piece in stream:
            assert piece.token_ids == (7,)
            break
        assert await ended(server)
        with pytest.raises(Cancelled, match="partial"):
            stream.result()
        assert stream.partial.token_ids == (7,)
        assert await stream.read() is None


async def test_leaving_the_context_ends_the_call_at_the_server(server: FakeInference) -> None:
    server.plays.append(hanging(first_chunk([7])))
    async with AsyncClient(server.target) as client:
        async with await client.generate("hello", stream=True) as stream:
            assert await stream.read() is not None
        assert await ended(server)


async def test_a_stream_that_is_dropped_ends_the_call_at_the_server(server: FakeInference) -> None:
    server.plays.append(hanging(first_chunk([7])))
    async with AsyncClient(server.target) as client:
        stream = await client.generate("hello", stream=True)
        assert await stream.read() is not None
        del stream
        gc.collect()
        assert await ended(server)


async def test_cancel_from_another_task_ends_a_waiting_reader_quietly(server: FakeInference) -> None:
    server.plays.append(hanging(first_chunk([7])))
    async with AsyncClient(server.target) as client:
        stream = await client.generate("hello", stream=True)
        assert await stream.read() is not None
        reader = asyncio.create_task(stream.read())
        await asyncio.sleep(0)
        stream.cancel()
        assert await reader is None
        assert await ended(server)


@pytest.mark.parametrize("how", ["the stream", "the reader"])
async def test_a_cancel_does_not_wait_for_the_next_attempt(server: FakeInference, how: str) -> None:
    server.plays.append(failing(grpc.StatusCode.UNAVAILABLE, retry_after_s="3600"))
    async with AsyncClient(server.target) as client:
        stream = await client.generate("hello", stream=True)
        reader = asyncio.create_task(stream.read())
        assert await ended(server)
        async with asyncio.timeout(20):
            if how == "the stream":
                stream.cancel()
                assert await reader is None
            else:
                reader.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await reader
        with pytest.raises(Cancelled):
            stream.result()
    assert len(server.requests) == 1


async def test_a_cancelled_task_takes_its_call_with_it(server: FakeInference) -> None:
    server.plays.append(hanging(first_chunk([7])))
    async with AsyncClient(server.target) as client:
        stream = await client.generate("hello", stream=True)
        assert await stream.read() is not None
        task = asyncio.create_task(stream.collect())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await ended(server)


async def test_close_ends_running_calls_and_refuses_new_ones(server: FakeInference) -> None:
    server.plays.append(hanging(first_chunk([7])))
    client = AsyncClient(server.target)
    stream = await client.generate("hello", stream=True)
    assert await stream.read() is not None
    reader = asyncio.create_task(stream.read())
    await asyncio.sleep(0)
    await client.close()
    with pytest.raises(Cancelled):
        await reader
    with pytest.raises(InvalidRequest, match="closed"):
        await client.generate("hello")


async def test_chunks_that_come_twice_are_read_once(server: FakeInference) -> None:
    server.plays.append(
        playing(first_chunk([7, 8]), chunk(0, [7, 8]), chunk(1, [8]), chunk(2, [9]), chunk(2, [9], "stop"))
    )
    async with AsyncClient(server.target) as client:
        result = await client.generate("hello")
    assert result.token_ids == (7, 8, 9)
    assert result.text == "<7><8><9>"
    assert result.finish_reason is FinishReason.STOP


@pytest.mark.parametrize(
    "chunks",
    [
        pytest.param([first_chunk([7]), chunk(2, [9], "stop")], id="gap"),
        pytest.param([first_chunk([7, 8]), chunk(1, [8, 9], "stop")], id="overlap"),
        pytest.param([first_chunk([7]), chunk(1, [8], "stop"), chunk(2, [9])], id="after the end"),
        pytest.param([first_chunk([7])], id="no end"),
        pytest.param([first_chunk([7]), chunk(1, [8], "because")], id="unknown reason"),
    ],
)
async def test_a_stream_that_cannot_be_right_is_an_internal_error(
    server: FakeInference, chunks: list[pb.GenerateChunk]
) -> None:
    server.plays.append(playing(*chunks))
    async with AsyncClient(server.target) as client:
        with pytest.raises(InternalError):
            await client.generate("hello")


async def test_unary_calls_return_values_and_are_retried(server: FakeInference, eager: RetryPolicy) -> None:
    async with AsyncClient(server.target, retry=eager) as client:
        server.unary_failures.append(grpc.StatusCode.UNAVAILABLE)
        assert await client.tokenize("AB") == (65, 66)
        assert await client.tokenize(messages=[ChatMessage("user", "four")]) == (4,)
        (model,) = await client.models()
        assert model == ModelInfo("tiny", context_tokens=64, vocab_size=99, dtype="float32")
        status = await client.status()
        assert status.workers[0].blocks.free == 8
        assert (status.index_available, status.admin) == (True, "h:1")
        server.unary_failures.append(grpc.StatusCode.NOT_FOUND)
        with pytest.raises(UnknownModel):
            await client.models()
