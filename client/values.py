"""What the client takes and gives: frozen values, free of protobuf."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pdserve.core.lifecycle import Ledger
from pdserve.core.types import FinishReason, RequestId, TokenLogprobs, Usage


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn of a chat. `role` is system, user, assistant or tool, as the model's template knows them."""

    role: str
    content: str = ""
    name: str = ""
    tool_call_id: str = ""
    """Of a `tool` message: the call that it answers."""
    tool_calls: Sequence[Mapping[str, Any]] = ()
    """Of an `assistant` message: OpenAI tool calls, arguments as JSON text."""


@dataclass(frozen=True, slots=True)
class PrefillCost:
    """What the router expected of computing the prompt in one place, in seconds."""

    seconds: float
    """Until the first token, once the decode worker has the request."""
    harm_s: float
    """What others lose by it, summed over them."""


@dataclass(frozen=True, slots=True)
class Route:
    """Who served a request, and what moved between workers for it."""

    prefill_worker: str = ""
    decode_worker: str = ""
    prefill_incarnation: str = ""
    decode_incarnation: str = ""
    prefill_pid: int | None = None
    decode_pid: int | None = None
    transport: str = ""
    """Empty when the decode worker prefilled by itself."""
    blocks_moved: int = 0
    bytes_moved: int = 0
    blocks_reused: int = 0
    """Prompt blocks that the decode worker already held."""
    candidates_tried: int = 0
    """Prefill candidates that were asked and did not serve."""
    predicted_local: PrefillCost | None = None
    """Of the decode worker computing the prompt; None, as the other one, where there was no choice."""
    predicted_handoff: PrefillCost | None = None
    """Of the best prefill worker computing it."""
    measured_s: float = 0.0
    """What the way that was taken took, as the decode worker measured it: the `seconds` of its prediction."""
    prefix_blocks_fetched: int = 0
    """Prompt blocks that the prefill worker fetched from `prefix_worker` instead of computing them."""
    prefix_worker: str = ""
    """Empty when nothing was fetched."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """One piece of one choice of a streamed completion."""

    request_id: RequestId
    choice: int
    """From 0 to n - 1; the pieces of all choices come mixed, those of one in order."""
    text: str
    """May be empty: text whose meaning later tokens decide is held back."""
    token_ids: tuple[int, ...]
    first_index: int
    """Index of `token_ids[0]` among the choice's tokens."""
    finish_reason: FinishReason | None
    """None until the choice's last chunk."""
    logprobs: tuple[TokenLogprobs, ...]
    """One per token id where they were asked for, else none."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One of the n completions of a request."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    """None in a Partial, where the choice has not ended."""
    logprobs: tuple[TokenLogprobs, ...]
    """One per token id where they were asked for, else none."""


@dataclass(frozen=True, slots=True)
class Partial:
    """What is known of a completion that has not ended, or never will."""

    request_id: RequestId
    text: str
    """This and `token_ids` are those of choice 0."""
    token_ids: tuple[int, ...]
    choices: tuple[Choice, ...]
    ledger: Ledger
    """Parts in seconds; they sum to `ttft_s`. All zero before the first chunk."""
    route: Route
    ttft_s: float | None
    """Call to first chunk, seconds, attempts that failed included; None before the first chunk."""
    attempts: int
    """Calls made for it: 1 + retries."""


@dataclass(frozen=True, slots=True)
class Result:
    """A whole completion."""

    request_id: RequestId
    text: str
    """This, `token_ids` and `finish_reason` are those of choice 0."""
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    choices: tuple[Choice, ...]
    """All n of them, in order of index."""
    usage: Usage
    """`completion_tokens` sums over all choices."""
    ledger: Ledger
    """Parts in seconds; they sum to `ttft_s`, what no event explains being `network`."""
    route: Route
    ttft_s: float
    """Call to first chunk, seconds, attempts that failed included."""
    duration_s: float
    """Call to last chunk of all, seconds."""
    attempts: int
    """Calls made for it: 1 + retries."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A model that the cluster serves."""

    name: str
    context_tokens: int
    vocab_size: int
    dtype: str


@dataclass(frozen=True, slots=True)
class BlockCounts:
    """A worker's KV pool by state; `promised` overlays the others, which sum to `total`."""

    total: int
    free: int
    held: int
    reserved: int
    cached: int
    loading: int
    quarantined: int
    promised: int


@dataclass(frozen=True, slots=True)
class TransportUse:
    """What one worker has fetched over one transport since it started."""

    transport: str
    chunks: int
    bytes: int
    seconds: float
    """Time in copies, summed; copies may overlap."""
    pairs: int = 0
    """Peers that it fetches from over this transport now."""
    falls: int = 0
    """Times that a pair came down to this transport because a better one did not work."""


@dataclass(frozen=True, slots=True)
class IndexUse:
    """What a router has asked of the block index since it started."""

    lookups: int
    unanswered: int
    """Lookups without an answer in time: the ring alone placed."""
    seconds: float
    """Time of the answered lookups, summed."""
    asked_blocks: int
    found_blocks: int
    """Of the asked ones, those that the best holder had."""


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """A worker as its router sees it."""

    worker: str
    incarnation: str
    role: str
    model: str
    endpoint: str
    pid: int
    draining: bool
    role_weight: float
    """Share of its token budget spent on prefill: 1 prefill only, 0 decode only."""
    blocks: BlockCounts
    running: int
    waiting: int
    handoffs: int
    in_flight: int
    state: str
    """ready, draining or suspect."""
    uptime_s: float = 0.0
    preemptions: int = 0
    transports: tuple[TransportUse, ...] = ()


@dataclass(frozen=True, slots=True)
class ClusterStatus:
    """The cluster as the router sees it."""

    workers: tuple[WorkerStatus, ...]
    index: str
    index_available: bool
    requests_in_flight: int
    admin: str
    """host:port of the membership service; empty when nobody supervises."""
    index_use: IndexUse | None = None
    """None where the router does not meter its index."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)
