"""A real router over loopback gRPC, in front of workers that only speak the Session protocol."""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from router_fake_worker import BEAT_S, CONTEXT, SCHEMA, VOCABULARY, FakeWorker

from pdserve.core.config import RouterConfig, ServeConfig, SessionConfig
from pdserve.core.text.chat_template import ChatMessage
from pdserve.core.types import BlockName, Role, WorkerId
from pdserve.core.worker_record import WorkerRecord
from pdserve.kvtransfer.index.base import Holder, IndexUnavailable, Location
from pdserve.kvtransfer.index.memory import MemoryIndex
from pdserve.kvtransfer.names import chain, namespace, pack_chain, unpack_tokens
from pdserve.proto import inference_pb2, worker_pb2
from pdserve.proto.inference_pb2_grpc import InferenceStub
from pdserve.router import dispatch
from pdserve.router.server import RouterServer

PATIENT = SessionConfig(heartbeat_s=0.02, silence_s=20.0, reattach_s=20.0)
Call = Any


@dataclass
class FakeMember:
    record: WorkerRecord


class FakeMembership:
    """A membership that the test writes."""

    def __init__(self, records: Sequence[WorkerRecord]) -> None:
        self.members = tuple(FakeMember(record) for record in records)
        self.available = True

    def current(self) -> tuple[FakeMember, ...]:
        return self.members


class ByteTokenizer:
    """One token per byte."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_chat(self, messages: Sequence[ChatMessage], tools_json: str = "") -> list[int]:
        return self.encode("".join(f"{message.role}:{message.content};" for message in messages))


class BrokenIndex(MemoryIndex):
    """An index whose server is away."""

    async def locate(self, names: Sequence[BlockName], holders: Sequence[Holder]) -> dict[WorkerId, Location]:
        raise IndexUnavailable("no answer")


class Cluster:
    """A router, its fake workers, and a client's channel."""

    def __init__(self, router: RouterServer, membership: FakeMembership, channel: grpc.aio.Channel) -> None:
        self.router = router
        self.membership = membership
        self.channel = channel
        self.inference: Any = InferenceStub(channel)
        self.health: Any = health_pb2_grpc.HealthStub(channel)

    def generate(self, prompt: str = "hello", *, timeout: float | None = None, **fields: Any) -> Call:
        fields.setdefault("request_id", "r")
        if "token_ids" not in fields:
            fields["text"] = prompt
        return self.inference.Generate(inference_pb2.GenerateRequest(**fields), timeout=timeout)

    async def states(self) -> dict[str, str]:
        """The workers, as the router sees them."""
        status = await self.inference.GetStatus(inference_pb2.GetStatusRequest())
        return {worker.worker: worker.state for worker in status.workers}

    async def becomes(self, status: int) -> None:
        """Wait for the router's own news, not for a time."""
        async with asyncio.timeout(20):
            async for news in self.health.Watch(health_pb2.HealthCheckRequest()):
                if news.status == status:
                    return


@asynccontextmanager
async def running(
    *workers: FakeWorker,
    session: SessionConfig = PATIENT,
    router: RouterConfig | None = None,
    index: MemoryIndex | None = None,
    tokenizer: ByteTokenizer | None = None,
) -> AsyncIterator[Cluster]:
    for worker in workers:
        await worker.start()
    membership = FakeMembership([worker.record() for worker in workers])
    config = ServeConfig(
        session=session, router=replace(router or RouterConfig(), grpc_port=0, disaggregation="always")
    )
    tokenizers = {"tiny": tokenizer or ByteTokenizer()}
    server = RouterServer(config, index or MemoryIndex(), membership, tokenizers, "admin:1")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            cluster = Cluster(server, membership, channel)
            await cluster.becomes(health_pb2.HealthCheckResponse.SERVING)
            async with asyncio.timeout(20):
                for worker in workers:
                    await worker.hellos.get()
                # And the router has read theirs, and of each the first heartbeat that says something new.
                expected = {w.name: "draining" if w.load.draining else "ready" for w in workers}
                while await cluster.states() != expected:
                    await asyncio.sleep(BEAT_S)
            yield cluster
    finally:
        await server.stop()
        for worker in workers:
            await worker.stop()
    server.bookings.check_integrity()
    assert len(server.bookings) == 0, "a booking outlived its request"
    server.gate.admission.check_integrity()
    assert (server.gate.admission.in_flight, server.gate.admission.queued) == (0, 0), "a slot leaked"


def decoder(number: int = 0, incarnation: str = "one") -> FakeWorker:
    return FakeWorker(f"decode-{number}", Role.DECODE, incarnation)


def prefiller(number: int = 0) -> FakeWorker:
    return FakeWorker(f"prefill-{number}", Role.PREFILL)


async def soon(queue: "asyncio.Queue[Any]") -> Any:
    async with asyncio.timeout(20):
        return await queue.get()


async def chunks_of(call: Call, count: int) -> list[inference_pb2.GenerateChunk]:
    async with asyncio.timeout(20):
        return [await call.read() for _ in range(count)]


async def rest_of(call: Call) -> list[inference_pb2.GenerateChunk]:
    chunks: list[inference_pb2.GenerateChunk] = []
    async with asyncio.timeout(20):
        while (chunk := await call.read()) is not grpc.aio.EOF:
            chunks.append(chunk)
    return chunks


Failure = tuple[grpc.StatusCode, str, dict[str, str]]
"""Code, message, trailing metadata."""


async def end_of(call: Call) -> Failure | None:
    """How a call ended, after whatever it still delivers; None for a good end."""
    try:
        await rest_of(call)
    except grpc.aio.AioRpcError as error:
        return error.code(), error.details() or "", dict(error.trailing_metadata())  # type: ignore[arg-type]
    return None


async def failure_of(call: Call) -> Failure:
    failure = await end_of(call)
    assert failure is not None, "the call ended well"
    return failure


def ids(chunks: Sequence[inference_pb2.GenerateChunk]) -> list[int]:
    return [token for chunk in chunks for token in chunk.token_ids]


async def test_a_request_streams_from_its_owner_with_the_routers_ledger() -> None:
    p, d = prefiller(), decoder()
    async with running(p, d) as cluster:
        prompt = "a prompt of more than sixteen bytes"
        call = cluster.generate(prompt, sampling=inference_pb2.Sampling(max_tokens=3))
        opened = await soon(d.opens)
        d.say("r", 0, [7], "seven")
        d.say("r", 1, [8, 9], " eight nine", finish="length")
        first, last = await rest_of(call)

        assert (await soon(d.acks)).request_id == "r"
    assert (ids([first, last]), first.text + last.text) == ([7, 8, 9], "seven eight nine")
    assert (first.finish_reason, last.finish_reason, last.usage.completion_tokens) == ("", "length", 3)
    assert (first.ledger.prefill, first.ledger.first_step) == (0.25, 0.5)
    assert min(first.ledger.queue, first.ledger.locate, first.ledger.place) > 0.0
    assert first.route.decode_worker == "decode-0"
    assert not last.HasField("ledger")

    tokens = tuple(prompt.encode())
    root = namespace(bytes.fromhex(SCHEMA))
    assert unpack_tokens(opened.prompt_token_ids) == tokens
    assert (opened.namespace, opened.chain) == (root, pack_chain(chain(root, tokens)))
    assert [candidate.worker for candidate in opened.candidates] == ["prefill-0", "decode-0"]
    assert opened.candidates[0].endpoint == p.record().endpoint
    assert (opened.sampling.max_tokens, opened.sampling.HasField("temperature")) == (3, True)
    assert not opened.HasField("remaining_s")


async def test_token_ids_and_chats_are_prompts_too() -> None:
    d = decoder()
    async with running(prefiller(), d) as cluster:
        chat = inference_pb2.ChatMessages(
            messages=[inference_pb2.ChatMessage(role="user", content="hi" * 3000)]
        )
        tokenized = await cluster.inference.Tokenize(inference_pb2.TokenizeRequest(chat=chat))
        assert bytes(tokenized.token_ids).startswith(b"user:hihi")

        call = cluster.generate(token_ids=inference_pb2.TokenIds(ids=[5, 6]))
        assert unpack_tokens((await soon(d.opens)).prompt_token_ids) == (5, 6)
        d.say("r", 0, [1], finish="stop")
        assert ids(await rest_of(call)) == [1]


class HeldTokenizer(ByteTokenizer):
    """Its chat template ends when the test says so."""

    def __init__(self) -> None:
        self.released = threading.Event()

    def encode_chat(self, messages: Sequence[ChatMessage], tools_json: str = "") -> list[int]:
        assert self.released.wait(20), "nobody else ran meanwhile"
        return super().encode_chat(messages, tools_json)


async def test_a_slow_template_of_a_short_chat_keeps_nobody_waiting() -> None:
    d, tokenizer = decoder(), HeldTokenizer()
    chat = inference_pb2.ChatMessages(messages=[inference_pb2.ChatMessage(role="user", content="hi")])
    async with running(prefiller(), d, tokenizer=tokenizer) as cluster:
        held = cluster.inference.Tokenize(inference_pb2.TokenizeRequest(chat=chat))
        call = cluster.generate()
        await soon(d.opens)
        d.say("r", 0, [1], finish="stop")
        assert ids(await rest_of(call)) == [1]
        assert not held.done()
        tokenizer.released.set()
        assert bytes((await held).token_ids) == b"user:hi;"


async def test_a_cancel_reaches_the_worker() -> None:
    d = decoder()
    async with running(prefiller(), d) as cluster:
        call = cluster.generate()
        await soon(d.opens)
        d.say("r", 0, [1])
        await chunks_of(call, 1)
        call.cancel()
        assert (await soon(d.cancels)).request_id == "r"
        d.say("r", 1, [2])  # crossed the cancel on its way
        again = cluster.generate(request_id="again")
        await soon(d.opens)
        d.say("again", 0, [3], finish="stop")
        assert ids(await rest_of(again)) == [3]


async def test_a_cancel_before_the_first_token_reaches_the_worker() -> None:
    d = decoder()
    async with running(prefiller(), d) as cluster:
        call = cluster.generate()
        await soon(d.opens)
        call.cancel()
        assert (await soon(d.cancels)).request_id == "r"


async def test_a_deadline_is_forwarded_and_enforced(leap: Callable[[float], Awaitable[None]]) -> None:
    d = decoder()
    async with running(prefiller(), d) as cluster:
        call = cluster.generate(timeout=30)
        opened = await soon(d.opens)
        assert 0.0 < opened.remaining_s < 31.0  # the wire rounds deadlines up
        await leap(31.0)
        code, _, _ = await failure_of(call)
        assert code is grpc.StatusCode.DEADLINE_EXCEEDED
        assert (await soon(d.cancels)).request_id == "r"


async def test_a_refused_request_is_placed_on_another_owner() -> None:
    owners = {worker.name: worker for worker in (decoder(0), decoder(1))}
    async with running(prefiller(), *owners.values()) as cluster:
        call = cluster.generate()
        refusing = await first_opened(owners)
        owners.pop(refusing).refuse("r")
        (other,) = owners.values()
        opened = await soon(other.opens)
        assert opened.candidates[-1].worker == other.name
        other.say("r", 0, [4], finish="stop")
        assert ids(await rest_of(call)) == [4]


async def test_three_refusals_shed_the_request() -> None:
    owners = {worker.name: worker for worker in (decoder(number) for number in range(4))}
    async with running(prefiller(), *owners.values()) as cluster:
        call = cluster.generate()
        for retry_after_s in (3.0, 1.5, 2.0):
            owners.pop(await first_opened(owners)).refuse("r", retry_after_s)
        code, message, metadata = await failure_of(call)
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "pool is full" in message
    assert (metadata["retriable"], metadata["retry-after-s"]) == ("true", "1.5")
    assert all(worker.opens.empty() for worker in owners.values()), "a fourth owner was asked"


async def first_opened(owners: dict[str, FakeWorker]) -> str:
    """The worker among `owners` that is asked first."""
    waiting = {asyncio.create_task(worker.opens.get()): name for name, worker in owners.items()}
    done, pending = await asyncio.wait(waiting, timeout=20, return_when=asyncio.FIRST_COMPLETED)
    for task in pending:
        task.cancel()
    (task,) = done
    return waiting[task]


async def test_a_broken_session_is_taken_up_where_it_was_left() -> None:
    d = decoder()
    async with running(prefiller(), d) as cluster:
        call = cluster.generate()
        await soon(d.opens)
        d.say("r", 0, [10], "a")
        d.say("r", 1, [11], "b")
        before = await chunks_of(call, 2)
        d.break_session()
        attach = await soon(d.attaches)
        assert (attach.request_id, attach.incarnation, list(attach.next_index)) == ("r", "one", [2])
        d.say("r", 1, [11], "b")  # sent again
        d.say("r", 2, [12], "c")
        d.say("r", 3, [13], "d", finish="stop")
        chunks = [*before, *await rest_of(call)]
    assert (ids(chunks), "".join(chunk.text for chunk in chunks)) == ([10, 11, 12, 13], "abcd")


async def test_a_request_without_a_token_is_opened_again() -> None:
    d = decoder()
    async with running(prefiller(), d) as cluster:
        call = cluster.generate(timeout=20)
        first = await soon(d.opens)
        d.break_session()
        second = await soon(d.opens)
        assert second.remaining_s < first.remaining_s
        assert second.prompt_token_ids == first.prompt_token_ids
        d.say("r", 0, [1], finish="stop")
        assert ids(await rest_of(call)) == [1]


async def test_a_killed_worker_that_comes_back_as_itself_goes_on() -> None:
    d = decoder()
    async with running(prefiller(), d) as cluster:
        call = cluster.generate()
        await soon(d.opens)
        d.say("r", 0, [1])
        await chunks_of(call, 1)
        await d.stop()
        await cluster.becomes(health_pb2.HealthCheckResponse.NOT_SERVING)
        await d.start()
        assert (await soon(d.attaches)).next_index == [1]
        d.say("r", 1, [2], finish="stop")
        assert ids(await rest_of(call)) == [2]


async def test_a_new_incarnation_loses_the_requests_but_not_their_tokens() -> None:
    d = decoder()
    async with running(prefiller(), d) as cluster:
        call = cluster.generate()
        await soon(d.opens)
        d.say("r", 0, [1])
        assert ids(await chunks_of(call, 1)) == [1]
        d.incarnation = "two"
        d.break_session()
        code, message, metadata = await failure_of(call)
        assert code is grpc.StatusCode.UNAVAILABLE
        assert metadata["retriable"] == "true"
        assert "two" in message
        assert d.attaches.empty()

        cluster.membership.members = (FakeMember(d.record()),)
        await cluster.becomes(health_pb2.HealthCheckResponse.SERVING)
        again = cluster.generate(request_id="again")
        await soon(d.opens)
        d.say("again", 0, [2], finish="stop")
        assert ids(await rest_of(again)) == [2]


async def test_a_replacement_in_the_membership_ends_the_old_session() -> None:
    old, new = decoder(), decoder(incarnation="two")
    async with running(prefiller(), old) as cluster:
        await new.start()
        call = cluster.generate()
        await soon(old.opens)
        old.say("r", 0, [1])
        await chunks_of(call, 1)
        cluster.membership.members = (FakeMember(new.record()),)
        code, _, metadata = await failure_of(call)
        assert (code, metadata["retriable"]) == (grpc.StatusCode.UNAVAILABLE, "true")
    await new.stop()


async def test_a_worker_that_stays_away_loses_its_requests() -> None:
    d = decoder()
    async with running(prefiller(), d, session=replace(PATIENT, reattach_s=0.2)) as cluster:
        call = cluster.generate()
        await soon(d.opens)
        d.say("r", 0, [1])
        await chunks_of(call, 1)
        await d.stop()
        code, message, metadata = await failure_of(call)
        assert (code, metadata["retriable"]) == (grpc.StatusCode.UNAVAILABLE, "true")
        assert "0.2 s" in message


async def test_a_worker_that_leaves_the_membership_finishes_what_it_has() -> None:
    d, other = decoder(0), decoder(1)
    async with running(prefiller(), d) as cluster:
        await other.start()
        call = cluster.generate()
        await soon(d.opens)
        cluster.membership.members = (FakeMember(other.record()),)
        await soon(other.hellos)
        d.say("r", 0, [1], finish="stop")
        assert ids(await rest_of(call)) == [1]
    await other.stop()


async def test_an_engine_that_makes_no_step_is_suspect_until_it_does() -> None:
    d = decoder()
    session = replace(PATIENT, silence_s=1.0)
    async with running(prefiller(), d, session=session) as cluster:
        d.load.running = 1
        await cluster.becomes(health_pb2.HealthCheckResponse.NOT_SERVING)
        code, message, metadata = await failure_of(cluster.generate())
        assert (code, metadata["retriable"]) == (grpc.StatusCode.UNAVAILABLE, "true")
        assert "decode-0" in message
        d.load.running = 0
        await cluster.becomes(health_pb2.HealthCheckResponse.SERVING)


async def test_a_silent_worker_is_hung_up_on_and_welcome_again() -> None:
    d = decoder()
    session = replace(PATIENT, silence_s=0.5, reattach_s=0.2)
    async with running(prefiller(), d, session=session) as cluster:
        call = cluster.generate()
        await soon(d.opens)
        d.beating = False
        code, message, metadata = await failure_of(call)
        assert (code, metadata["retriable"]) == (grpc.StatusCode.UNAVAILABLE, "true")
        assert "silent" in message
        d.beating = True
        await soon(d.hellos)
        await cluster.becomes(health_pb2.HealthCheckResponse.SERVING)


async def test_a_slow_reader_is_aborted_and_disturbs_nobody() -> None:
    d = decoder()
    session = replace(PATIENT, client_buffer_tokens=32)
    async with running(prefiller(), d, session=session) as cluster:
        slow = cluster.generate(request_id="slow")
        await soon(d.opens)
        for index in range(400):
            d.say("slow", index, [1], "x" * 16_384)
        assert (await soon(d.cancels)).request_id == "slow"
        assert cluster.router.gate.admission.in_flight == 0, "it holds its slot though it reads nothing"

        quick = cluster.generate(request_id="quick")
        await soon(d.opens)
        for index in range(200):
            d.say("quick", index, [index], finish="stop" if index == 199 else "")
            if index % 20 == 19:
                read = await chunks_of(quick, 20)
                assert ids(read) == list(range(index - 19, index + 1))

        code, message, _ = await failure_of(slow)
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "32 tokens unread" in message


async def test_a_workers_failure_is_the_clients() -> None:
    d = decoder()
    async with running(prefiller(), d) as cluster:
        call = cluster.generate()
        await soon(d.opens)
        d.fail("r", worker_pb2.Failure(code=14, message="draining", retriable=True, retry_after_s=2.0))
        code, message, metadata = await failure_of(call)
        assert (code, message) == (grpc.StatusCode.UNAVAILABLE, "draining")
        assert (metadata["retriable"], metadata["retry-after-s"]) == ("true", "2")
        assert (await soon(d.acks)).request_id == "r"


async def test_the_index_away_means_the_ring_alone() -> None:
    d = decoder()
    async with running(prefiller(), d, index=BrokenIndex()) as cluster:
        call = cluster.generate("x" * 100)
        assert (await soon(d.opens)).candidates[0].worker == "prefill-0"
        d.say("r", 0, [1], finish="stop")
        assert ids(await rest_of(call)) == [1]


@pytest.mark.parametrize("long_prompt_tokens", [399, 400], ids=["named in a thread", "named at once"])
async def test_the_holder_of_a_prefix_is_asked_first(
    long_prompt_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "LONG_PROMPT_TOKENS", long_prompt_tokens)
    d, index = decoder(), MemoryIndex()
    prompt = "y" * 400
    names = chain(namespace(bytes.fromhex(SCHEMA)), tuple(prompt.encode()))
    workers = [prefiller(number) for number in range(4)]
    for worker in workers[2:3]:
        await index.add(WorkerId(worker.name), worker.record().incarnation, 1, names, "any")
    async with running(*workers, d, index=index) as cluster:
        call = cluster.generate(prompt)
        assert (await soon(d.opens)).candidates[0].worker == "prefill-2"
        d.say("r", 0, [1], finish="stop")
        await rest_of(call)


async def test_beyond_slots_and_queue_requests_are_shed_and_the_queue_moves_on() -> None:
    d = decoder()
    async with running(prefiller(), d, router=RouterConfig(max_in_flight=1, max_queue=1)) as cluster:
        first = cluster.generate(request_id="first")
        await soon(d.opens)
        later = [cluster.generate(request_id=f"later-{number}") for number in range(3)]
        ends = asyncio.as_completed([end_of(call) for call in later], timeout=20)
        refused = [await next(ends), await next(ends)]
        d.say("first", 0, [1], finish="stop")
        await rest_of(first)
        d.say((await soon(d.opens)).request_id, 0, [2], finish="stop")
        assert await next(ends) is None, "the one that waited is served"
    for failure in refused:
        assert failure is not None
        code, message, metadata = failure
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "limit 1" in message
        assert (metadata["retriable"], float(metadata["retry-after-s"]) > 0) == ("true", True)


@pytest.mark.parametrize(
    ("fields", "code", "said"),
    [
        ({"model": "huge"}, grpc.StatusCode.NOT_FOUND, "tiny"),
        ({"prompt": ""}, grpc.StatusCode.INVALID_ARGUMENT, "empty"),
        ({"sampling": {"max_tokens": 0}}, grpc.StatusCode.INVALID_ARGUMENT, "at least 1"),
        ({"sampling": {"temperature": -1.0}}, grpc.StatusCode.INVALID_ARGUMENT, "temperature is -1"),
        ({"sampling": {"top_p": 1.5}}, grpc.StatusCode.INVALID_ARGUMENT, "top_p is 1.5"),
        ({"token_ids": {"ids": [VOCABULARY]}}, grpc.StatusCode.INVALID_ARGUMENT, str(VOCABULARY - 1)),
        ({"token_ids": {"ids": [VOCABULARY] * 20_000}}, grpc.StatusCode.INVALID_ARGUMENT, "20000 tokens"),
        ({"sampling": {"max_tokens": CONTEXT}}, grpc.StatusCode.INVALID_ARGUMENT, str(CONTEXT)),
        ({"prompt": "z" * (CONTEXT + 1)}, grpc.StatusCode.INVALID_ARGUMENT, str(CONTEXT)),
        ({"request_id": "x" * 200}, grpc.StatusCode.INVALID_ARGUMENT, "128"),
    ],
)
async def test_the_door_says_what_is_wrong(fields: dict[str, Any], code: grpc.StatusCode, said: str) -> None:
    d = decoder()
    async with running(prefiller(), d) as cluster:
        got, message, metadata = await failure_of(cluster.generate(**fields))
        assert got is code
        assert said in message
        assert metadata["retriable"] == "false"
        assert d.opens.empty()


async def test_a_request_id_in_use_is_refused() -> None:
    d = decoder()
    async with running(prefiller(), d) as cluster:
        call = cluster.generate()
        await soon(d.opens)
        code, message, _ = await failure_of(cluster.generate())
        assert (code, "in use" in message) == (grpc.StatusCode.INVALID_ARGUMENT, True)
        d.say("r", 0, [1], finish="stop")
        assert ids(await rest_of(call)) == [1]


async def test_status_models_health_and_reflection_say_what_there_is() -> None:
    d = decoder()
    async with running(prefiller(), d) as cluster:
        call = cluster.generate()
        await soon(d.opens)
        status = await cluster.inference.GetStatus(inference_pb2.GetStatusRequest())
        assert {worker.worker: worker.state for worker in status.workers} == {
            "decode-0": "ready",
            "prefill-0": "ready",
        }
        assert (status.requests_in_flight, status.admin, status.index_available) == (1, "admin:1", True)
        d.say("r", 0, [1], finish="stop")
        await rest_of(call)

        (model,) = (await cluster.inference.ListModels(inference_pb2.ListModelsRequest())).models
        assert (model.name, model.context_tokens, model.vocab_size) == ("tiny", CONTEXT, VOCABULARY)

        named = health_pb2.HealthCheckRequest(service="pdserve.v1.Inference")
        assert (await cluster.health.Check(named)).status == health_pb2.HealthCheckResponse.SERVING
        asked = reflection_pb2.ServerReflectionRequest(list_services="")
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(cluster.channel)
        async for answer in stub.ServerReflectionInfo(iter([asked])):
            listed = {service.name for service in answer.list_services_response.service}
        assert {"pdserve.v1.Inference", "grpc.health.v1.Health"} <= listed


async def test_a_draining_worker_gets_nothing_new_and_says_so() -> None:
    d, other = decoder(0), decoder(1)
    d.load.draining = True
    async with running(prefiller(), other, d) as cluster:
        for number in range(5):
            call = cluster.generate(request_id=str(number))
            await soon(other.opens)
            other.say(str(number), 0, [1], finish="stop")
            await rest_of(call)
        assert (await cluster.states())["decode-0"] == "draining"
    assert d.opens.empty()


async def test_stopping_the_router_fails_what_runs_as_retriable() -> None:
    d = decoder()
    async with running(prefiller(), d) as cluster:
        call = cluster.generate()
        await soon(d.opens)
        d.say("r", 0, [1])
        await chunks_of(call, 1)
        ending = asyncio.create_task(failure_of(call))
        await cluster.router.stop(grace_s=0.0)
        code, message, metadata = await ending
        assert (code, metadata["retriable"]) == (grpc.StatusCode.UNAVAILABLE, "true")
        assert "router stops" in message
        assert (await soon(d.cancels)).request_id == "r"
