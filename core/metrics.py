"""Names of what a router exports, as Prometheus writes them: units in the name, seconds and tokens."""

from enum import StrEnum

NAMESPACE = "pdserve"
"""Prefix of every name, with an underscore."""


class Metric(StrEnum):
    """What `GET /metrics` shows. Counters get Prometheus' `_total`."""

    REQUESTS = "requests"
    """Counter, label `code`: ended generation requests by the HTTP status that their end stands for."""
    REQUESTS_REJECTED = "requests_rejected"
    """Counter, label `reason`: requests that were refused before anything was generated for them."""
    IN_FLIGHT = "requests_in_flight"
    """Gauge: generation requests that have arrived at this router and not ended."""
    TIME_TO_FIRST_TOKEN = "time_to_first_token_seconds"
    """Histogram: arrival at the router to the first chunk; what the network adds is not in it."""
    INTER_TOKEN_LATENCY = "inter_token_latency_seconds"
    """Histogram: between two chunks of one choice."""
    E2E_LATENCY = "e2e_request_latency_seconds"
    """Histogram: arrival to the end, of requests that ended well."""
    QUEUE_TIME = "request_queue_time_seconds"
    """Histogram: the ledger's `queue`."""
    PREFILL_PREDICTION_ERROR = "prefill_prediction_error_ratio"
    """Histogram, label `path`, local or handoff: |predicted - measured| / measured of the route's seconds to
    the first token, for the way that was taken. What the choice between the two ways rests on."""
    PROMPT_TOKENS = "prompt_tokens"
    """Counter."""
    CACHED_PROMPT_TOKENS = "prefix_cache_hits"
    """Counter: prompt tokens that nobody had to compute."""
    GENERATED_TOKENS = "generation_tokens"
    """Counter."""
    WORKER_RUNNING = "num_requests_running"
    """Gauge, label `worker`. It and the rest are of the last heartbeat: up to `session.heartbeat_s` old."""
    WORKER_WAITING = "num_requests_waiting"
    """Gauge, label `worker`."""
    KV_USAGE = "kv_cache_usage_ratio"
    """Gauge, label `worker`: blocks that are neither free nor merely cached, of all."""
    KV_BLOCKS = "kv_cache_blocks"
    """Gauge, labels `worker`, `state`: free + held + reserved + cached + loading + quarantined = total."""
