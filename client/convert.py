"""The one place where the client's values and the protobuf messages of `pdserve.v1` meet."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

from pdserve.client.values import (
    BlockCounts,
    ChatMessage,
    Chunk,
    ClusterStatus,
    ModelInfo,
    Route,
    WorkerStatus,
)
from pdserve.core.errors import InternalError, InvalidRequest
from pdserve.core.lifecycle import Ledger
from pdserve.core.types import FinishReason, RequestId, Usage
from pdserve.proto import inference_pb2 as pb

Messages = Sequence[ChatMessage | Mapping[str, str]]
"""A chat: ChatMessage values, or mappings with exactly the keys `role` and `content`."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is to be completed: exactly one of the three is not None."""

    text: str | None
    messages: Messages | None
    token_ids: Sequence[int] | None

    def __post_init__(self) -> None:
        forms = {"prompt": self.text, "messages": self.messages, "token_ids": self.token_ids}
        given = [name for name, value in forms.items() if value is not None]
        if len(given) != 1:
            got = " and ".join(given) or "none of them"
            raise InvalidRequest(f"got {got}: give exactly one of prompt, messages and token_ids")


class RequestOptions(TypedDict, total=False):
    """The keywords of `generate`; what is absent or None is the server's choice."""

    messages: Messages | None
    """A chat that the model's template turns into text."""
    token_ids: Sequence[int] | None
    model: str
    """Needed only where the cluster serves several."""
    max_tokens: int | None
    temperature: float | None
    """0 is greedy."""
    top_p: float | None
    top_k: int | None
    seed: int | None
    ignore_eos: bool
    """Go on to max_tokens also past the model's end-of-sequence token."""
    request_id: str | None
    """A name to ask about the request by; the cluster makes one where none is given."""


def generate_request(
    prompt: str | None = None,
    *,
    messages: Messages | None = None,
    token_ids: Sequence[int] | None = None,
    model: str = "",
    max_tokens: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int | None = None,
    ignore_eos: bool = False,
    request_id: str | None = None,
) -> pb.GenerateRequest:
    """Build the request. Raises InvalidRequest for values that no field can hold, such as negative counts."""
    given = Prompt(prompt, messages, token_ids)
    try:
        request = pb.GenerateRequest(
            request_id=request_id or "",
            model=model,
            sampling=pb.Sampling(
                max_tokens=max_tokens,
                temperature=temperature,
                top_p=top_p,
                top_k=top_k,
                seed=seed,
                ignore_eos=ignore_eos,
            ),
        )
        if given.text is not None:
            request.text = given.text
        elif given.messages is not None:
            request.chat.CopyFrom(_chat(given.messages))
        else:
            request.token_ids.CopyFrom(pb.TokenIds(ids=given.token_ids or ()))
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"the request cannot be encoded: {error}") from error
    return request


def tokenize_request(prompt: Prompt, model: str) -> pb.TokenizeRequest:
    """Build the request; token ids are refused, they are the answer."""
    if prompt.messages is not None:
        return pb.TokenizeRequest(model=model, chat=_chat(prompt.messages))
    if prompt.text is None:
        raise InvalidRequest("tokenize takes prompt or messages, token_ids are what it returns")
    return pb.TokenizeRequest(model=model, text=prompt.text)


def chunk(message: pb.GenerateChunk) -> Chunk:
    return Chunk(
        request_id=RequestId(message.request_id),
        text=message.text,
        token_ids=tuple(message.token_ids),
        first_index=message.first_index,
        finish_reason=_finish_reason(message.finish_reason),
    )


def usage(message: pb.Usage) -> Usage:
    return Usage(message.prompt_tokens, message.completion_tokens, message.cached_tokens)


def ledger(message: pb.Ledger) -> Ledger:
    """The server's parts, in seconds; `network` is still 0, see Ledger.close."""
    return Ledger(
        queue=message.queue,
        locate=message.locate,
        place=message.place,
        retry=message.retry,
        prefill_queue=message.prefill_queue,
        prefill=message.prefill,
        exposed_transfer=message.exposed_transfer,
        first_step=message.first_step,
    )


def route(message: pb.Route) -> Route:
    return Route(
        prefill_worker=message.prefill_worker,
        decode_worker=message.decode_worker,
        prefill_incarnation=message.prefill_incarnation,
        decode_incarnation=message.decode_incarnation,
        prefill_pid=message.prefill_pid or None,
        decode_pid=message.decode_pid or None,
        transport=message.transport,
        blocks_moved=message.blocks_moved,
        bytes_moved=message.bytes_moved,
        blocks_reused=message.blocks_reused,
        candidates_tried=message.candidates_tried,
    )


def models(message: pb.ListModelsResponse) -> tuple[ModelInfo, ...]:
    return tuple(ModelInfo(m.name, m.context_tokens, m.vocab_size, m.dtype) for m in message.models)


def status(message: pb.GetStatusResponse) -> ClusterStatus:
    return ClusterStatus(
        workers=tuple(_worker(worker) for worker in message.workers),
        index=message.index,
        index_available=message.index_available,
        requests_in_flight=message.requests_in_flight,
        admin=message.admin,
    )


def _worker(message: pb.WorkerStatus) -> WorkerStatus:
    return WorkerStatus(
        worker=message.worker,
        incarnation=message.incarnation,
        role=message.role,
        model=message.model,
        endpoint=message.endpoint,
        pid=message.pid,
        draining=message.draining,
        role_weight=message.role_weight,
        blocks=_blocks(message.blocks),
        running=message.running,
        waiting=message.waiting,
        handoffs=message.handoffs,
        in_flight=message.in_flight,
        state=message.state,
    )


def _blocks(message: pb.BlockCounts) -> BlockCounts:
    return BlockCounts(
        total=message.total,
        free=message.free,
        held=message.held,
        reserved=message.reserved,
        cached=message.cached,
        loading=message.loading,
        quarantined=message.quarantined,
        promised=message.promised,
    )


def _finish_reason(name: str) -> FinishReason | None:
    if not name:
        return None
    try:
        return FinishReason(name)
    except ValueError as error:
        known = ", ".join(FinishReason)
        raise InternalError(
            f"the server ended with reason {name!r}, this client knows {known}: update it"
        ) from error


def _chat(messages: Messages) -> pb.ChatMessages:
    if not messages:
        raise InvalidRequest("messages is empty: give at least one")
    return pb.ChatMessages(messages=[_chat_message(message) for message in messages])


def _chat_message(message: ChatMessage | Mapping[str, str]) -> pb.ChatMessage:
    if isinstance(message, ChatMessage):
        return pb.ChatMessage(role=message.role, content=message.content)
    if set(message) != {"role", "content"}:
        raise InvalidRequest(
            f"a message has the keys {sorted(message)}: it must have role and content, no others"
        )
    return pb.ChatMessage(role=message["role"], content=message["content"])
