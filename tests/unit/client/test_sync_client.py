import inspect
import threading

import grpc
import pytest
from fake_inference import FakeInference, chunk, failing, first_chunk, hanging

from pdserve.client import AsyncChunkStream, AsyncClient, ChunkStream, Client, RetryPolicy, StreamLost
from pdserve.core.errors import Cancelled, InvalidRequest, Unavailable


def public(kind: type) -> set[str]:
    return {name for name in vars(kind) if not name.startswith("_")}


def test_both_clients_offer_the_same_calls() -> None:
    assert public(AsyncClient) - {"open_stream"} == public(Client)
    assert public(AsyncChunkStream) - {"collect"} == public(ChunkStream)
    for name in public(Client):
        ours, theirs = (
            [(p.name, p.kind, p.default) for p in inspect.signature(getattr(kind, name)).parameters.values()]
            for kind in (Client, AsyncClient)
        )
        assert ours == theirs, name


async def test_both_clients_give_the_same_result(server: FakeInference) -> None:
    async with AsyncClient(server.target) as client:
        theirs = await client.generate("hello")
    with Client(server.target) as blocking:
        ours = blocking.generate("hello")
    assert (ours.text, ours.token_ids, ours.usage, ours.route) == (
        theirs.text,
        theirs.token_ids,
        theirs.usage,
        theirs.route,
    )


def test_a_stream_is_an_iterator_with_a_result(server: FakeInference) -> None:
    with Client(server.target) as client:
        stream = client.generate("hello", stream=True)
        assert next(stream).token_ids == (7,)
        assert [piece.token_ids for piece in stream] == [(8, 9), (10,)]
        with pytest.raises(StopIteration):
            next(stream)
        assert stream.result().token_ids == (7, 8, 9, 10)
        assert stream.result().ledger.total() == pytest.approx(stream.result().ttft_s, abs=1e-12)


def test_leaving_the_loop_early_ends_the_call(server: FakeInference) -> None:
    server.plays.append(hanging(first_chunk([7]), chunk(1, [8])))
    with Client(server.target) as client:
        stream = client.generate("hello", stream=True)
        for piece in stream:
            assert piece.token_ids == (7,)
            break
        assert server.ended.acquire(timeout=20)
        assert next(stream, None) is None
        with pytest.raises(Cancelled):
            stream.result()


def test_cancel_from_another_thread_ends_a_waiting_reader(server: FakeInference) -> None:
    server.plays.append(hanging(first_chunk([7])))
    with Client(server.target) as client, client.generate("hello", stream=True) as stream:
        assert next(stream).token_ids == (7,)
        canceller = threading.Thread(target=stream.cancel)
        canceller.start()
        assert next(stream, None) is None
        canceller.join()
        assert server.ended.acquire(timeout=20)


def test_errors_cross_the_thread(server: FakeInference) -> None:
    server.plays.append(failing(grpc.StatusCode.UNAVAILABLE, first_chunk([7]), chunk(1, [8])))
    server.plays.extend([failing(grpc.StatusCode.UNAVAILABLE)] * 3)
    with Client(server.target, retry=RetryPolicy(base_s=0.001)) as client:
        with pytest.raises(StreamLost) as caught:
            client.generate("hello")
        assert caught.value.partial.token_ids == (7, 8)
        with pytest.raises(Unavailable):
            client.generate("hello")
        with pytest.raises(InvalidRequest):
            client.generate()


def test_unary_calls_work_without_a_loop(server: FakeInference) -> None:
    with Client(server.target) as client:
        assert client.tokenize("AB") == (65, 66)
        assert client.models()[0].name == "tiny"
        assert client.status().workers[0].worker == "decode-0"


def test_threads_share_one_client(server: FakeInference) -> None:
    results: list[tuple[int, ...]] = []
    with Client(server.target) as client:

        def call() -> None:
            results.append(client.generate("hello").token_ids)

        threads = [threading.Thread(target=call) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert results == [(7, 8, 9, 10)] * 6


def test_no_thread_is_left_after_close(server: FakeInference) -> None:
    before = set(threading.enumerate())
    client = Client(server.target)
    ours = [thread for thread in threading.enumerate() if thread.name.startswith("pdserve-client")]
    client.generate("hello")
    client.close()
    client.close()
    assert len(ours) == 1
    assert not ours[0].is_alive()
    left = {thread for thread in set(threading.enumerate()) - before if thread.name.startswith("pdserve")}
    assert left == set()
    with pytest.raises(InvalidRequest, match="closed"):
        client.generate("hello")


def test_close_ends_a_call_that_another_thread_waits_for(server: FakeInference) -> None:
    server.plays.append(hanging(first_chunk([7])))
    client = Client(server.target)
    stream = client.generate("hello", stream=True)
    next(stream)
    caught: list[BaseException] = []

    def read() -> None:
        try:
            next(stream)
        except BaseException as error:
            caught.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    client.close()
    reader.join(20)
    assert not reader.is_alive()
    assert [type(error) for error in caught] in ([Cancelled], [InvalidRequest])
    assert server.ended.acquire(timeout=20)
