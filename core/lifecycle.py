"""The events of one request in time order, and the ledger made of their differences.

Each part of the ledger is a difference of two events read on *one* process's clock, so that no clock is ever
compared with another. The parts follow each other without overlap, so none is negative and their sum never
exceeds the time to first token that the client measures; what is left is named `network`.

    process   event               meaning
    client    CALLED              generate() was called
    router    ARRIVED             the request was read
    router    ADMITTED            validated, tokenized, admitted            queue = ADMITTED - ARRIVED
    router    LOCATED             the index (or its time-out) answered      locate = LOCATED - ADMITTED
    router    PLACED              Open went to the decode worker            place = PLACED - LOCATED
    D         FIRST_OPEN          the first candidate was asked
    D         SERVING_OPEN        the candidate that served was asked       retry = SERVING_OPEN - FIRST_OPEN
    P (or D)  PREFILL_QUEUED      the prefill was accepted
    P (or D)  PREFILL_STARTED     its first chunk was scheduled             prefill_queue
    P (or D)  PREFILL_ENDED       its last chunk was computed               prefill
    D         FILLED_SEEN         D reads that the prefill ended
    D         COMMITTED           the KV is D's, checked                    exposed_transfer
    D         FIRST_TOKEN         the first token was sampled               first_step
    client    FIRST_CHUNK         the first chunk was read                  TTFT = FIRST_CHUNK - CALLED

A prefix that P (or D) fetches from another worker, instead of computing it, comes before PREFILL_STARTED.
A prefill in D's own engine has no transfer: its exposed_transfer is 0 and COMMITTED is PREFILL_ENDED, the
moment the step that samples the first token begins.
"""

from dataclasses import dataclass, fields, replace
from enum import StrEnum


class Lifecycle(StrEnum):
    """Every event of a request, in time order. Tests wait for these, never for a sleep."""

    CALLED = "called"
    ARRIVED = "arrived"
    ADMITTED = "admitted"
    LOCATED = "located"
    PLACED = "placed"
    FIRST_OPEN = "first_open"
    SERVING_OPEN = "serving_open"
    PREFILL_QUEUED = "prefill_queued"
    PREFILL_STARTED = "prefill_started"
    CHUNK_READY = "chunk_ready"
    PREFILL_ENDED = "prefill_ended"
    RESERVED = "reserved"
    CHUNK_LANDED = "chunk_landed"
    FILLED_SEEN = "filled_seen"
    VERIFIED = "verified"
    COMMITTED = "committed"
    FIRST_TOKEN = "first_token"
    TOKEN = "token"
    FINISHED = "finished"
    FIRST_CHUNK = "first_chunk"


@dataclass(frozen=True, slots=True)
class Ledger:
    """Where a request's time to first token went, in seconds."""

    queue: float = 0.0
    locate: float = 0.0
    place: float = 0.0
    retry: float = 0.0
    prefill_queue: float = 0.0
    prefill: float = 0.0
    exposed_transfer: float = 0.0
    first_step: float = 0.0
    network: float = 0.0

    def total(self) -> float:
        """Sum of the parts; equals the TTFT once `close` has named the rest."""
        return float(sum(getattr(self, field.name) for field in fields(self)))

    def close(self, ttft_s: float) -> "Ledger":
        """Name what the parts do not explain. `ttft_s` is the client's measurement, in seconds."""
        known = replace(self, network=0.0)
        return replace(known, network=ttft_s - known.total())

    def parts(self) -> dict[str, float]:
        """Part name to seconds, in the order in which the time passed."""
        return {field.name: getattr(self, field.name) for field in fields(self)}
