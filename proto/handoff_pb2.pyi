from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class OffersRequest(_message.Message):
    __slots__ = ("schema", "representation", "transports", "decode_worker", "decode_incarnation", "prefill_incarnation")
    SCHEMA_FIELD_NUMBER: _ClassVar[int]
    REPRESENTATION_FIELD_NUMBER: _ClassVar[int]
    TRANSPORTS_FIELD_NUMBER: _ClassVar[int]
    DECODE_WORKER_FIELD_NUMBER: _ClassVar[int]
    DECODE_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    PREFILL_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    schema: bytes
    representation: Representation
    transports: _containers.RepeatedScalarFieldContainer[str]
    decode_worker: str
    decode_incarnation: str
    prefill_incarnation: str
    def __init__(self, schema: _Optional[bytes] = ..., representation: _Optional[_Union[Representation, _Mapping]] = ..., transports: _Optional[_Iterable[str]] = ..., decode_worker: _Optional[str] = ..., decode_incarnation: _Optional[str] = ..., prefill_incarnation: _Optional[str] = ...) -> None: ...

class OffersReply(_message.Message):
    __slots__ = ("offers", "rejected")
    OFFERS_FIELD_NUMBER: _ClassVar[int]
    REJECTED_FIELD_NUMBER: _ClassVar[int]
    offers: _containers.RepeatedCompositeFieldContainer[TransportOffer]
    rejected: HandoffRejected
    def __init__(self, offers: _Optional[_Iterable[_Union[TransportOffer, _Mapping]]] = ..., rejected: _Optional[_Union[HandoffRejected, _Mapping]] = ...) -> None: ...

class DecodeMessage(_message.Message):
    __slots__ = ("open", "grant", "release", "abort", "heartbeat")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    GRANT_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    ABORT_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    open: HandoffOpen
    grant: HandoffGrant
    release: HandoffRelease
    abort: HandoffAbort
    heartbeat: HandoffHeartbeat
    def __init__(self, open: _Optional[_Union[HandoffOpen, _Mapping]] = ..., grant: _Optional[_Union[HandoffGrant, _Mapping]] = ..., release: _Optional[_Union[HandoffRelease, _Mapping]] = ..., abort: _Optional[_Union[HandoffAbort, _Mapping]] = ..., heartbeat: _Optional[_Union[HandoffHeartbeat, _Mapping]] = ...) -> None: ...

class HandoffOpen(_message.Message):
    __slots__ = ("handoff_id", "request_id", "schema", "representation", "token_ids", "chain", "remaining_s", "transports", "digest", "decode_worker", "decode_incarnation", "prefill_incarnation", "prefix", "held_only")
    HANDOFF_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    SCHEMA_FIELD_NUMBER: _ClassVar[int]
    REPRESENTATION_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    CHAIN_FIELD_NUMBER: _ClassVar[int]
    REMAINING_S_FIELD_NUMBER: _ClassVar[int]
    TRANSPORTS_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    DECODE_WORKER_FIELD_NUMBER: _ClassVar[int]
    DECODE_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    PREFILL_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    HELD_ONLY_FIELD_NUMBER: _ClassVar[int]
    handoff_id: str
    request_id: str
    schema: bytes
    representation: Representation
    token_ids: bytes
    chain: bytes
    remaining_s: float
    transports: _containers.RepeatedScalarFieldContainer[str]
    digest: bool
    decode_worker: str
    decode_incarnation: str
    prefill_incarnation: str
    prefix: PrefixHolder
    held_only: bool
    def __init__(self, handoff_id: _Optional[str] = ..., request_id: _Optional[str] = ..., schema: _Optional[bytes] = ..., representation: _Optional[_Union[Representation, _Mapping]] = ..., token_ids: _Optional[bytes] = ..., chain: _Optional[bytes] = ..., remaining_s: _Optional[float] = ..., transports: _Optional[_Iterable[str]] = ..., digest: _Optional[bool] = ..., decode_worker: _Optional[str] = ..., decode_incarnation: _Optional[str] = ..., prefill_incarnation: _Optional[str] = ..., prefix: _Optional[_Union[PrefixHolder, _Mapping]] = ..., held_only: _Optional[bool] = ...) -> None: ...

class PrefixHolder(_message.Message):
    __slots__ = ("worker", "incarnation", "endpoint", "blocks")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    worker: str
    incarnation: str
    endpoint: str
    blocks: int
    def __init__(self, worker: _Optional[str] = ..., incarnation: _Optional[str] = ..., endpoint: _Optional[str] = ..., blocks: _Optional[int] = ...) -> None: ...

class Representation(_message.Message):
    __slots__ = ("dtype", "tp", "num_layers", "num_kv_heads", "head_dim", "block_tokens")
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    TP_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    NUM_KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    BLOCK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    dtype: str
    tp: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_tokens: int
    def __init__(self, dtype: _Optional[str] = ..., tp: _Optional[int] = ..., num_layers: _Optional[int] = ..., num_kv_heads: _Optional[int] = ..., head_dim: _Optional[int] = ..., block_tokens: _Optional[int] = ...) -> None: ...

class HandoffGrant(_message.Message):
    __slots__ = ("epoch", "seq", "transport", "segments")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SEQ_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    seq: int
    transport: str
    segments: _containers.RepeatedCompositeFieldContainer[BlockSegment]
    def __init__(self, epoch: _Optional[int] = ..., seq: _Optional[int] = ..., transport: _Optional[str] = ..., segments: _Optional[_Iterable[_Union[BlockSegment, _Mapping]]] = ...) -> None: ...

class BlockSegment(_message.Message):
    __slots__ = ("source", "generation", "destination", "valid_tokens")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    DESTINATION_FIELD_NUMBER: _ClassVar[int]
    VALID_TOKENS_FIELD_NUMBER: _ClassVar[int]
    source: int
    generation: int
    destination: int
    valid_tokens: int
    def __init__(self, source: _Optional[int] = ..., generation: _Optional[int] = ..., destination: _Optional[int] = ..., valid_tokens: _Optional[int] = ...) -> None: ...

class HandoffRelease(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class HandoffAbort(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class HandoffHeartbeat(_message.Message):
    __slots__ = ("progress",)
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    progress: int
    def __init__(self, progress: _Optional[int] = ...) -> None: ...

class PrefillMessage(_message.Message):
    __slots__ = ("opened", "rejected", "chunk", "filled", "released", "aborted", "heartbeat", "source_failed")
    OPENED_FIELD_NUMBER: _ClassVar[int]
    REJECTED_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    FILLED_FIELD_NUMBER: _ClassVar[int]
    RELEASED_FIELD_NUMBER: _ClassVar[int]
    ABORTED_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FAILED_FIELD_NUMBER: _ClassVar[int]
    opened: HandoffOpened
    rejected: HandoffRejected
    chunk: HandoffChunk
    filled: HandoffFilled
    released: HandoffReleased
    aborted: HandoffAbort
    heartbeat: HandoffHeartbeat
    source_failed: HandoffSourceFailed
    def __init__(self, opened: _Optional[_Union[HandoffOpened, _Mapping]] = ..., rejected: _Optional[_Union[HandoffRejected, _Mapping]] = ..., chunk: _Optional[_Union[HandoffChunk, _Mapping]] = ..., filled: _Optional[_Union[HandoffFilled, _Mapping]] = ..., released: _Optional[_Union[HandoffReleased, _Mapping]] = ..., aborted: _Optional[_Union[HandoffAbort, _Mapping]] = ..., heartbeat: _Optional[_Union[HandoffHeartbeat, _Mapping]] = ..., source_failed: _Optional[_Union[HandoffSourceFailed, _Mapping]] = ...) -> None: ...

class HandoffOpened(_message.Message):
    __slots__ = ("estimate_s", "queue_position", "offers", "prefill_worker", "prefill_incarnation", "prefill_pid", "cached_blocks")
    ESTIMATE_S_FIELD_NUMBER: _ClassVar[int]
    QUEUE_POSITION_FIELD_NUMBER: _ClassVar[int]
    OFFERS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_WORKER_FIELD_NUMBER: _ClassVar[int]
    PREFILL_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    PREFILL_PID_FIELD_NUMBER: _ClassVar[int]
    CACHED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    estimate_s: float
    queue_position: int
    offers: _containers.RepeatedCompositeFieldContainer[TransportOffer]
    prefill_worker: str
    prefill_incarnation: str
    prefill_pid: int
    cached_blocks: int
    def __init__(self, estimate_s: _Optional[float] = ..., queue_position: _Optional[int] = ..., offers: _Optional[_Iterable[_Union[TransportOffer, _Mapping]]] = ..., prefill_worker: _Optional[str] = ..., prefill_incarnation: _Optional[str] = ..., prefill_pid: _Optional[int] = ..., cached_blocks: _Optional[int] = ...) -> None: ...

class TransportOffer(_message.Message):
    __slots__ = ("transport", "parameters")
    class ParametersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    transport: str
    parameters: _containers.ScalarMap[str, str]
    def __init__(self, transport: _Optional[str] = ..., parameters: _Optional[_Mapping[str, str]] = ...) -> None: ...

class HandoffRejected(_message.Message):
    __slots__ = ("reason", "retry_after_s", "outcome", "held_blocks")
    REASON_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_S_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    HELD_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    reason: str
    retry_after_s: float
    outcome: str
    held_blocks: int
    def __init__(self, reason: _Optional[str] = ..., retry_after_s: _Optional[float] = ..., outcome: _Optional[str] = ..., held_blocks: _Optional[int] = ...) -> None: ...

class HandoffChunk(_message.Message):
    __slots__ = ("seq", "first_block", "blocks", "generations", "last_valid_tokens", "digests")
    SEQ_FIELD_NUMBER: _ClassVar[int]
    FIRST_BLOCK_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    GENERATIONS_FIELD_NUMBER: _ClassVar[int]
    LAST_VALID_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DIGESTS_FIELD_NUMBER: _ClassVar[int]
    seq: int
    first_block: int
    blocks: _containers.RepeatedScalarFieldContainer[int]
    generations: _containers.RepeatedScalarFieldContainer[int]
    last_valid_tokens: int
    digests: bytes
    def __init__(self, seq: _Optional[int] = ..., first_block: _Optional[int] = ..., blocks: _Optional[_Iterable[int]] = ..., generations: _Optional[_Iterable[int]] = ..., last_valid_tokens: _Optional[int] = ..., digests: _Optional[bytes] = ...) -> None: ...

class HandoffFilled(_message.Message):
    __slots__ = ("chunks", "tokens", "prefill_queue_s", "prefill_s", "cached_tokens", "prefix_blocks_fetched", "prefix_worker")
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_S_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFIX_BLOCKS_FETCHED_FIELD_NUMBER: _ClassVar[int]
    PREFIX_WORKER_FIELD_NUMBER: _ClassVar[int]
    chunks: int
    tokens: int
    prefill_queue_s: float
    prefill_s: float
    cached_tokens: int
    prefix_blocks_fetched: int
    prefix_worker: str
    def __init__(self, chunks: _Optional[int] = ..., tokens: _Optional[int] = ..., prefill_queue_s: _Optional[float] = ..., prefill_s: _Optional[float] = ..., cached_tokens: _Optional[int] = ..., prefix_blocks_fetched: _Optional[int] = ..., prefix_worker: _Optional[str] = ...) -> None: ...

class HandoffReleased(_message.Message):
    __slots__ = ("status",)
    STATUS_FIELD_NUMBER: _ClassVar[int]
    status: str
    def __init__(self, status: _Optional[str] = ...) -> None: ...

class HandoffSourceFailed(_message.Message):
    __slots__ = ("epoch", "seq", "reason")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SEQ_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    seq: int
    reason: str
    def __init__(self, epoch: _Optional[int] = ..., seq: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...
