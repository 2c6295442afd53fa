from pdserve.proto import handoff_pb2 as _handoff_pb2
from pdserve.proto import inference_pb2 as _inference_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SessionRequest(_message.Message):
    __slots__ = ("hello", "open", "attach", "cancel", "ack")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    OPEN_FIELD_NUMBER: _ClassVar[int]
    ATTACH_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    ACK_FIELD_NUMBER: _ClassVar[int]
    hello: SessionHello
    open: OpenRequest
    attach: AttachRequest
    cancel: CancelRequest
    ack: AckRequest
    def __init__(self, hello: _Optional[_Union[SessionHello, _Mapping]] = ..., open: _Optional[_Union[OpenRequest, _Mapping]] = ..., attach: _Optional[_Union[AttachRequest, _Mapping]] = ..., cancel: _Optional[_Union[CancelRequest, _Mapping]] = ..., ack: _Optional[_Union[AckRequest, _Mapping]] = ...) -> None: ...

class SessionHello(_message.Message):
    __slots__ = ("router",)
    ROUTER_FIELD_NUMBER: _ClassVar[int]
    router: str
    def __init__(self, router: _Optional[str] = ...) -> None: ...

class Candidate(_message.Message):
    __slots__ = ("worker", "incarnation", "endpoint")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    worker: str
    incarnation: str
    endpoint: str
    def __init__(self, worker: _Optional[str] = ..., incarnation: _Optional[str] = ..., endpoint: _Optional[str] = ...) -> None: ...

class OpenRequest(_message.Message):
    __slots__ = ("request_id", "prompt_token_ids", "chain", "sampling", "candidates", "remaining_s", "namespace", "prefix")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    CHAIN_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    REMAINING_S_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    prompt_token_ids: bytes
    chain: bytes
    sampling: _inference_pb2.Sampling
    candidates: _containers.RepeatedCompositeFieldContainer[Candidate]
    remaining_s: float
    namespace: bytes
    prefix: _handoff_pb2.PrefixHolder
    def __init__(self, request_id: _Optional[str] = ..., prompt_token_ids: _Optional[bytes] = ..., chain: _Optional[bytes] = ..., sampling: _Optional[_Union[_inference_pb2.Sampling, _Mapping]] = ..., candidates: _Optional[_Iterable[_Union[Candidate, _Mapping]]] = ..., remaining_s: _Optional[float] = ..., namespace: _Optional[bytes] = ..., prefix: _Optional[_Union[_handoff_pb2.PrefixHolder, _Mapping]] = ...) -> None: ...

class AttachRequest(_message.Message):
    __slots__ = ("request_id", "incarnation", "next_index")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    NEXT_INDEX_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    incarnation: str
    next_index: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, request_id: _Optional[str] = ..., incarnation: _Optional[str] = ..., next_index: _Optional[_Iterable[int]] = ...) -> None: ...

class CancelRequest(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    def __init__(self, request_id: _Optional[str] = ...) -> None: ...

class AckRequest(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    def __init__(self, request_id: _Optional[str] = ...) -> None: ...

class SessionResponse(_message.Message):
    __slots__ = ("hello", "frame", "replace", "heartbeat")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    FRAME_FIELD_NUMBER: _ClassVar[int]
    REPLACE_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    hello: WorkerHello
    frame: Frame
    replace: Replace
    heartbeat: WorkerHeartbeat
    def __init__(self, hello: _Optional[_Union[WorkerHello, _Mapping]] = ..., frame: _Optional[_Union[Frame, _Mapping]] = ..., replace: _Optional[_Union[Replace, _Mapping]] = ..., heartbeat: _Optional[_Union[WorkerHeartbeat, _Mapping]] = ...) -> None: ...

class WorkerHello(_message.Message):
    __slots__ = ("worker", "incarnation")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    worker: str
    incarnation: str
    def __init__(self, worker: _Optional[str] = ..., incarnation: _Optional[str] = ...) -> None: ...

class Frame(_message.Message):
    __slots__ = ("items",)
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    items: _containers.RepeatedCompositeFieldContainer[FrameItem]
    def __init__(self, items: _Optional[_Iterable[_Union[FrameItem, _Mapping]]] = ...) -> None: ...

class FrameItem(_message.Message):
    __slots__ = ("request_id", "choice", "first_index", "token_ids", "text", "finish_reason", "ledger", "route", "usage", "failure", "logprobs")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    FIRST_INDEX_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    LEDGER_FIELD_NUMBER: _ClassVar[int]
    ROUTE_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    choice: int
    first_index: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    text: str
    finish_reason: str
    ledger: _inference_pb2.Ledger
    route: _inference_pb2.Route
    usage: _inference_pb2.Usage
    failure: Failure
    logprobs: _containers.RepeatedCompositeFieldContainer[_inference_pb2.PositionLogprobs]
    def __init__(self, request_id: _Optional[str] = ..., choice: _Optional[int] = ..., first_index: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., text: _Optional[str] = ..., finish_reason: _Optional[str] = ..., ledger: _Optional[_Union[_inference_pb2.Ledger, _Mapping]] = ..., route: _Optional[_Union[_inference_pb2.Route, _Mapping]] = ..., usage: _Optional[_Union[_inference_pb2.Usage, _Mapping]] = ..., failure: _Optional[_Union[Failure, _Mapping]] = ..., logprobs: _Optional[_Iterable[_Union[_inference_pb2.PositionLogprobs, _Mapping]]] = ...) -> None: ...

class Failure(_message.Message):
    __slots__ = ("code", "message", "retriable", "retry_after_s")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RETRIABLE_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_S_FIELD_NUMBER: _ClassVar[int]
    code: int
    message: str
    retriable: bool
    retry_after_s: float
    def __init__(self, code: _Optional[int] = ..., message: _Optional[str] = ..., retriable: _Optional[bool] = ..., retry_after_s: _Optional[float] = ...) -> None: ...

class Replace(_message.Message):
    __slots__ = ("request_id", "reason", "retry_after_s")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_S_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    reason: str
    retry_after_s: float
    def __init__(self, request_id: _Optional[str] = ..., reason: _Optional[str] = ..., retry_after_s: _Optional[float] = ...) -> None: ...

class WorkerHeartbeat(_message.Message):
    __slots__ = ("progress", "load")
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    progress: int
    load: WorkerLoad
    def __init__(self, progress: _Optional[int] = ..., load: _Optional[_Union[WorkerLoad, _Mapping]] = ...) -> None: ...

class WorkerLoad(_message.Message):
    __slots__ = ("queued_prefill_tokens", "running", "waiting", "context_tokens", "blocks", "draining", "role_weight", "perf_model", "handoffs", "in_flight", "uptime_s", "preemptions", "transports", "queued_prefills", "ways", "prefills", "prefill_busy_s")
    class PerfModelEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    class WaysEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    QUEUED_PREFILL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    ROLE_WEIGHT_FIELD_NUMBER: _ClassVar[int]
    PERF_MODEL_FIELD_NUMBER: _ClassVar[int]
    HANDOFFS_FIELD_NUMBER: _ClassVar[int]
    IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    TRANSPORTS_FIELD_NUMBER: _ClassVar[int]
    QUEUED_PREFILLS_FIELD_NUMBER: _ClassVar[int]
    WAYS_FIELD_NUMBER: _ClassVar[int]
    PREFILLS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_BUSY_S_FIELD_NUMBER: _ClassVar[int]
    queued_prefill_tokens: int
    running: int
    waiting: int
    context_tokens: int
    blocks: _inference_pb2.BlockCounts
    draining: bool
    role_weight: float
    perf_model: _containers.ScalarMap[str, float]
    handoffs: int
    in_flight: int
    uptime_s: float
    preemptions: int
    transports: _containers.RepeatedCompositeFieldContainer[_inference_pb2.TransportUse]
    queued_prefills: int
    ways: _containers.ScalarMap[str, str]
    prefills: int
    prefill_busy_s: float
    def __init__(self, queued_prefill_tokens: _Optional[int] = ..., running: _Optional[int] = ..., waiting: _Optional[int] = ..., context_tokens: _Optional[int] = ..., blocks: _Optional[_Union[_inference_pb2.BlockCounts, _Mapping]] = ..., draining: _Optional[bool] = ..., role_weight: _Optional[float] = ..., perf_model: _Optional[_Mapping[str, float]] = ..., handoffs: _Optional[int] = ..., in_flight: _Optional[int] = ..., uptime_s: _Optional[float] = ..., preemptions: _Optional[int] = ..., transports: _Optional[_Iterable[_Union[_inference_pb2.TransportUse, _Mapping]]] = ..., queued_prefills: _Optional[int] = ..., ways: _Optional[_Mapping[str, str]] = ..., prefills: _Optional[int] = ..., prefill_busy_s: _Optional[float] = ...) -> None: ...

class InspectRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class InspectResponse(_message.Message):
    __slots__ = ("status", "load", "integrity_error", "counters")
    class CountersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    STATUS_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    INTEGRITY_ERROR_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    status: _inference_pb2.WorkerStatus
    load: WorkerLoad
    integrity_error: str
    counters: _containers.ScalarMap[str, int]
    def __init__(self, status: _Optional[_Union[_inference_pb2.WorkerStatus, _Mapping]] = ..., load: _Optional[_Union[WorkerLoad, _Mapping]] = ..., integrity_error: _Optional[str] = ..., counters: _Optional[_Mapping[str, int]] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("grace_s",)
    GRACE_S_FIELD_NUMBER: _ClassVar[int]
    grace_s: float
    def __init__(self, grace_s: _Optional[float] = ...) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ("failed_requests",)
    FAILED_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    failed_requests: int
    def __init__(self, failed_requests: _Optional[int] = ...) -> None: ...

class SetRoleWeightRequest(_message.Message):
    __slots__ = ("role_weight",)
    ROLE_WEIGHT_FIELD_NUMBER: _ClassVar[int]
    role_weight: float
    def __init__(self, role_weight: _Optional[float] = ...) -> None: ...

class SetRoleWeightResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
