"""How long work takes on one worker, learned from what it did: prefill, decode steps, transfers.

    step     =  prefill: a + b·Σ new tokens + c·Σ ((cached + new)² - cached²)
              + decode:  a + b·Σ context + c·sequences
    transfer =  latency + bytes / bandwidth, per transport (or peer)
    handoff  =  what a handoff takes beside queue and prefill at P: core/handoff_overhead.py

The form is that of DistServe (OSDI '24, section 4); a step that does both costs the sum. The worker fits; its
coefficients travel in heartbeats as plain floats (`snapshot`) and the router predicts with them (`restore`).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from pdserve.core.exploration import Exploration, PrefillPath
from pdserve.core.handoff_overhead import HandoffOverhead, Movement
from pdserve.core.linearfit import LinearFit
from pdserve.core.running_error import RunningError

_STEP_TERMS: Final = (
    "prefill/step_seconds",
    "prefill/token_seconds",
    "prefill/attention_seconds",
    "decode/step_seconds",
    "decode/sequence_seconds",
    "decode/context_token_seconds",
)
_STEP_PRIOR: Final = (1e-2, 5e-4, 1e-8, 1e-2, 2e-3, 2e-6)
"""Seconds per unit before anything was measured: a small model on a few CPU cores."""

_TRANSFER_TERMS: Final = ("latency_seconds", "byte_seconds")
_TRANSFER_PRIOR: Final = (1e-3, 1e-9)
"""1 ms and 1 GB/s before anything was measured."""

_PREFILL_ERROR: Final = "prefill/relative_error"
_DECODE_ERROR: Final = "decode/relative_error"
_FILL_ERROR: Final = "fill/relative_error"
_TRANSFER: Final = "transfer"
_SHORTEST_SECONDS: Final = 1e-6
"""No work that exists is predicted to take less."""

_LARGEST: Final = 1e15
"""No number of a snapshot is larger: what is predicted with such ones of any work is finite."""

_SHORTEST_FILL_SECONDS: Final = 1e-2
"""A prefill that is not longer, as predicted or as it was, says nothing about estimates."""


def prefill_attention(new_tokens: int, cached_tokens: int) -> int:
    """The quadratic term of one sequence's chunk, (cached + new)² - cached².

    Terms of chunks that follow each other add up to the term of the whole.
    """
    return (cached_tokens + new_tokens) ** 2 - cached_tokens**2


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One engine step: wall seconds, and what it computed.

    `prefill_attention` is the sum of `prefill_attention(new, cached)` of its chunks; `decode_context`
    that of the context lengths, in tokens, of its `decode_sequences`.
    """

    seconds: float
    prefill_tokens: int = 0
    prefill_attention: int = 0
    decode_sequences: int = 0
    decode_context: int = 0


@dataclass(frozen=True, slots=True)
class TransferRecord:
    """One transfer: wall seconds and payload. `transport` is the key that predictions are asked with."""

    seconds: float
    num_bytes: int
    transport: str


@dataclass(frozen=True, slots=True)
class Prediction:
    """Seconds, and the recent mean of |predicted - measured| / measured, None before there is one."""

    seconds: float
    relative_error: float | None


class PerfModel:
    """Predictions from records; reads no clock. Any thread may predict or snapshot; what is observed of one
    kind (steps; transfers and handoffs; paths) comes from one thread."""

    def __init__(self) -> None:
        self._steps = LinearFit(_STEP_PRIOR)
        self._prefill_error = RunningError()
        self._decode_error = RunningError()
        self._fill_error = RunningError()
        self._transfers: dict[str, tuple[LinearFit, RunningError]] = {}
        self._overhead = HandoffOverhead()
        self._exploration = Exploration()

    def observe_step(self, record: StepRecord) -> None:
        """Learn from a step; one without work or without a positive finite duration is left out."""
        features = _step_features(record)
        if not any(features) or not _is_duration(record.seconds):
            return
        error = self._steps.observe(features, record.seconds)
        if record.prefill_tokens > 0:
            self._prefill_error.add(error)
        if record.decode_sequences > 0:
            self._decode_error.add(error)

    def observe_transfer(self, record: TransferRecord) -> None:
        """Learn from a transfer; one without a positive finite duration is left out."""
        if not _is_duration(record.seconds):
            return
        if record.transport not in self._transfers:
            self._transfers[record.transport] = (LinearFit(_TRANSFER_PRIOR), RunningError())
        fit, running = self._transfers[record.transport]
        running.add(fit.observe((1.0, float(record.num_bytes)), record.seconds))

    def observe_handoff(self, moved: Movement, transport: str, seconds: float) -> None:
        """Learn what a whole handoff took beside the queue and the prefill at P."""
        if _is_duration(seconds):
            self._overhead.observe(transport, self._unhidden_s(moved, transport), seconds)

    def observe_path(self, path: PrefillPath, seconds: float) -> None:
        """A request of this worker's took `path`, and `seconds` to its first token."""
        if _is_duration(seconds):
            self._exploration.took(path, seconds)

    def observe_fill(self, predicted_seconds: float, seconds: float) -> None:
        """Learn how far off another worker's estimate of a whole prefill was, its queue included.

        One that is not a number, or of a prefill too short to plan by, is left out.
        """
        if not math.isfinite(predicted_seconds) or not _is_duration(seconds):
            return
        if max(predicted_seconds, seconds) > _SHORTEST_FILL_SECONDS:
            self._fill_error.add(abs(predicted_seconds - seconds) / seconds)

    @property
    def fill_error(self) -> float | None:
        """Recent mean relative error of other workers' estimates; None before there is one."""
        return self._fill_error.mean

    def prefill_seconds(self, new_tokens: int, cached_tokens: int, chunk_tokens: int) -> Prediction:
        """Compute time of a prompt's `new_tokens` after `cached_tokens`, in steps of at most `chunk_tokens`.

        No new tokens take no time. Queueing is not in it.
        """
        if new_tokens < 0 or cached_tokens < 0 or chunk_tokens < 1:
            raise ValueError(
                f"prefill of {new_tokens} after {cached_tokens} tokens in chunks of {chunk_tokens}"
            )
        if new_tokens == 0:
            return Prediction(0.0, self._prefill_error.mean)
        steps = -(-new_tokens // chunk_tokens)
        features = (steps, new_tokens, prefill_attention(new_tokens, cached_tokens), 0, 0, 0)
        return Prediction(_at_least_shortest(self._steps.predict(features)), self._prefill_error.mean)

    def packed_prefill_seconds(self, new_tokens: int, cached_tokens: int, token_budget: int) -> Prediction:
        """What a prefill adds to steps that compute other prompts, too, up to `token_budget` tokens each."""
        steps = new_tokens / token_budget
        features = (steps, new_tokens, prefill_attention(new_tokens, cached_tokens), 0, 0, 0)
        return Prediction(self._steps.predict(features), self._prefill_error.mean)

    def decode_step_seconds(self, batch: int, context: int) -> Prediction:
        """One decode step of `batch` sequences with `context` tokens of context in all; of none, no time."""
        if batch < 0 or context < 0:
            raise ValueError(f"decode step of {batch} sequences with {context} tokens of context")
        if batch == 0:
            return Prediction(0.0, self._decode_error.mean)
        features = (0, 0, 0, 1, batch, context)
        return Prediction(_at_least_shortest(self._steps.predict(features)), self._decode_error.mean)

    def transfer_seconds(self, num_bytes: int, transport: str) -> Prediction:
        """Moving `num_bytes` over `transport`; the prior where that transport has never been seen."""
        if num_bytes < 0:
            raise ValueError(f"transfer of {num_bytes} bytes")
        fit, running = self._transfers.get(transport) or (LinearFit(_TRANSFER_PRIOR), RunningError())
        return Prediction(_at_least_shortest(fit.predict((1.0, float(num_bytes)))), running.mean)

    def handoff_seconds(self, moved: Movement, transport: str) -> Prediction:
        """What a handoff adds to the queue and the prefill at P: messages, and the transfer that shows."""
        seconds, error = self._overhead.predict(transport, self._unhidden_s(moved, transport))
        return Prediction(_at_least_shortest(seconds), error)

    def credit_seconds(self, path: PrefillPath) -> float:
        """What this worker's next request may lose by trying `path`, see core/exploration.py."""
        return self._exploration.credit_s(path)

    @property
    def knows_prefill(self) -> bool:
        """Prefills were measured, here or where the snapshot comes from."""
        return self._prefill_error.mean is not None

    def _unhidden_s(self, moved: Movement, transport: str) -> float:
        whole = self.transfer_seconds(moved.num_bytes, transport).seconds
        last = self.transfer_seconds(moved.last_bytes, transport).seconds
        return max(last, whole - moved.prefill_s)

    def snapshot(self) -> dict[str, float]:
        """Everything that predictions depend on, as plain floats; `restore` reads it back."""
        values = dict(zip(_STEP_TERMS, self._steps.coefficients, strict=True))
        _put(values, _PREFILL_ERROR, self._prefill_error.mean)
        _put(values, _DECODE_ERROR, self._decode_error.mean)
        _put(values, _FILL_ERROR, self._fill_error.mean)
        for transport, (fit, running) in list(self._transfers.items()):
            for term, value in zip(_TRANSFER_TERMS, fit.coefficients, strict=True):
                values[f"{_TRANSFER}/{transport}/{term}"] = value
            _put(values, f"{_TRANSFER}/{transport}/relative_error", running.mean)
        return values | self._overhead.snapshot() | self._exploration.snapshot()

    def restore(self, values: Mapping[str, float]) -> None:
        """Predict as the model that made the snapshot did.

        Missing terms keep their priors and unknown names are ignored, so that workers and routers of
        different versions understand each other.

        Raises ValueError, and changes nothing, when a value is not from 0 to 1e15.
        """
        wrong = {name: value for name, value in values.items() if not 0.0 <= value <= _LARGEST}
        if wrong:
            raise ValueError(f"a performance snapshot holds numbers from 0 to {_LARGEST:g}, got {wrong}")
        names = [
            name.split("/", 1)[1].rsplit("/", 1)[0] for name in values if name.startswith(f"{_TRANSFER}/")
        ]
        self._steps = _restored(values, _STEP_TERMS, _STEP_PRIOR)
        self._prefill_error = RunningError(values.get(_PREFILL_ERROR))
        self._decode_error = RunningError(values.get(_DECODE_ERROR))
        self._fill_error = RunningError(values.get(_FILL_ERROR))
        self._transfers = {
            name: (
                _restored(
                    values, [f"{_TRANSFER}/{name}/{term}" for term in _TRANSFER_TERMS], _TRANSFER_PRIOR
                ),
                RunningError(values.get(f"{_TRANSFER}/{name}/relative_error")),
            )
            for name in dict.fromkeys(names)
        }
        self._overhead = HandoffOverhead(values)
        self._exploration = Exploration(values)


def _step_features(record: StepRecord) -> tuple[float, ...]:
    return (
        float(record.prefill_tokens > 0),
        float(record.prefill_tokens),
        float(record.prefill_attention),
        float(record.decode_sequences > 0),
        float(record.decode_sequences),
        float(record.decode_context),
    )


def _restored(values: Mapping[str, float], terms: Sequence[str], prior: tuple[float, ...]) -> LinearFit:
    start = [values.get(term, default) for term, default in zip(terms, prior, strict=True)]
    return LinearFit(prior, start)


def _put(values: dict[str, float], name: str, value: float | None) -> None:
    if value is not None:
        values[name] = value


def _is_duration(seconds: float) -> bool:
    return math.isfinite(seconds) and seconds > 0.0


def _at_least_shortest(seconds: float) -> float:
    return max(seconds, _SHORTEST_SECONDS)
