"""n > 1: choices come mixed in one stream and are kept apart."""

import grpc
import pytest
from fake_inference import FakeInference, chunk, failing, first_chunk, playing

from pdserve.client import AsyncClient, RetryPolicy, StreamLost
from pdserve.core.errors import InternalError
from pdserve.core.types import FinishReason, TokenLogprobs, Usage
from pdserve.proto import inference_pb2 as pb
from pdserve.proto.sampling import encode_logprobs

MIXED = (
    first_chunk([7]),
    chunk(0, [20], choice=1),
    chunk(1, [21, 22], "stop", choice=1),
    chunk(1, [8], "length"),
    chunk(0, [30], "length", choice=2),
)


async def test_choices_are_kept_apart_and_usage_is_summed(server: FakeInference) -> None:
    server.plays.append(playing(*MIXED))
    async with AsyncClient(server.target) as client:
        result = await client.generate("hello", n=3)
    assert [choice.index for choice in result.choices] == [0, 1, 2]
    assert [choice.token_ids for choice in result.choices] == [(7, 8), (20, 21, 22), (30,)]
    assert [choice.text for choice in result.choices] == ["<7><8>", "<20><21><22>", "<30>"]
    assert result.choices[1].finish_reason is FinishReason.STOP
    assert (result.text, result.token_ids) == ("<7><8>", (7, 8))
    assert result.finish_reason is FinishReason.LENGTH
    assert result.usage == Usage(prompt_tokens=5, completion_tokens=6, cached_tokens=2)
    assert server.requests[0].sampling.n == 3


async def test_a_stream_says_which_choice_each_chunk_is_of(server: FakeInference) -> None:
    server.plays.append(playing(*MIXED))
    async with AsyncClient(server.target) as client:
        stream = await client.generate("hello", n=3, stream=True)
        pieces = [(piece.choice, piece.first_index, piece.finish_reason) async for piece in stream]
    length = FinishReason.LENGTH
    assert pieces == [
        (0, 0, None),
        (1, 0, None),
        (1, 1, FinishReason.STOP),
        (0, 1, length),
        (2, 0, length),
    ]


@pytest.mark.parametrize(
    "chunks",
    [
        pytest.param(MIXED[:4], id="one never ended"),
        pytest.param((*MIXED, chunk(0, [1], "stop", choice=3)), id="one too many"),
        pytest.param((MIXED[0], chunk(1, [20], choice=1)), id="gap"),
        pytest.param((*MIXED[:3], chunk(3, [23], choice=1)), id="after its end"),
    ],
)
async def test_choices_that_cannot_be_right_are_an_internal_error(
    server: FakeInference, chunks: tuple[pb.GenerateChunk, ...]
) -> None:
    server.plays.append(playing(*chunks))
    async with AsyncClient(server.target) as client:
        with pytest.raises(InternalError):
            await client.generate("hello", n=3)


async def test_a_lost_stream_keeps_what_each_choice_had_and_is_not_tried_again(
    server: FakeInference, eager: RetryPolicy
) -> None:
    server.plays.append(failing(grpc.StatusCode.UNAVAILABLE, *MIXED[:3]))
    async with AsyncClient(server.target, retry=eager) as client:
        with pytest.raises(StreamLost) as caught:
            await client.generate("hello", n=3)
    partial = caught.value.partial
    assert [(choice.index, choice.token_ids) for choice in partial.choices] == [(0, (7,)), (1, (20, 21, 22))]
    assert [choice.finish_reason for choice in partial.choices] == [None, FinishReason.STOP]
    assert len(server.requests) == 1


async def test_chunks_of_a_choice_that_come_twice_are_read_once(server: FakeInference) -> None:
    server.plays.append(playing(*MIXED[:2], MIXED[1], MIXED[0], *MIXED[2:]))
    async with AsyncClient(server.target) as client:
        result = await client.generate("hello", n=3)
    assert [choice.token_ids for choice in result.choices] == [(7, 8), (20, 21, 22), (30,)]


async def test_logprobs_come_with_their_tokens(server: FakeInference) -> None:
    positions = tuple(
        TokenLogprobs(token, logprob=-0.5, rank=2, top=((9, -0.25), (token, -0.5))) for token in (7, 8, 9)
    )
    server.plays.append(
        playing(
            chunk(0, [7], logprobs=encode_logprobs(positions[:1])),
            chunk(0, [7], logprobs=encode_logprobs(positions[:1])),
            chunk(1, [8, 9], "stop", logprobs=encode_logprobs(positions[1:])),
        )
    )
    async with AsyncClient(server.target) as client:
        stream = await client.generate("hello", logprobs=2, stream=True)
        pieces = [piece.logprobs async for piece in stream]
    assert pieces == [positions[:1], positions[1:]]
    assert stream.result().choices[0].logprobs == positions
