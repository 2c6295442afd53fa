"""Channels to a router: what a target is, and options that notice a dead server within seconds."""

from pdserve.core.errors import InvalidRequest

KEEPALIVE_TIME_MS = 10_000
KEEPALIVE_TIMEOUT_MS = 5_000

CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    # A stopped or unreachable server closes nothing: only unanswered pings show it. A server with the default
    # policy ends silent calls for them; ours permits them, see core/channel_options.py.
    ("grpc.keepalive_time_ms", KEEPALIVE_TIME_MS),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
    ("grpc.http2.ping_timeout_ms", KEEPALIVE_TIMEOUT_MS),
    ("grpc.http2.max_pings_without_data", 0),
    # Retries come sooner than the default reconnect back-off of a second would let them through.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # Retrying is ours: grpc's own would hide attempts from the ledger.
    ("grpc.enable_retries", 0),
    ("grpc.max_receive_message_length", 16 * 1024 * 1024),
    ("grpc.max_send_message_length", 16 * 1024 * 1024),
)


def check_target(target: str) -> str:
    """Raises InvalidRequest for what is plainly no host:port; gRPC would look for a host of that name."""
    if "://" in target:
        raise InvalidRequest(
            f"the target {target!r} is a URL: write host:port of the gRPC API, without a scheme; "
            "the HTTP API is for OpenAI's clients"
        )
    if ":" not in target:
        raise InvalidRequest(f"the target {target!r} has no port: write host:port, such as 127.0.0.1:50051")
    return target
