"""gRPC channel and server options. Inside the cluster a stopped peer is noticed within two seconds.

A killed peer closes its streams at once; one that is stopped or unreachable does not, and keepalive alone is
not enough: without ping_timeout_ms nothing is noticed. The server must permit such pings, or it kills idle
connections for "too many pings".
"""

MAX_MESSAGE_BYTES = 16 * 1024 * 1024
"""A chain of 128k tokens and its digests fit many times over; bulk data never travels by gRPC."""

_Options = tuple[tuple[str, int], ...]

_PEER_PINGS: _Options = (
    ("grpc.keepalive_time_ms", 1000),
    ("grpc.keepalive_timeout_ms", 500),
    ("grpc.http2.ping_timeout_ms", 500),
)

_CLIENT_PINGS: _Options = (
    ("grpc.keepalive_time_ms", 15_000),
    ("grpc.keepalive_timeout_ms", 15_000),
    ("grpc.http2.ping_timeout_ms", 15_000),
)

_COMMON: _Options = (
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
)

_SERVER: _Options = (
    ("grpc.http2.min_ping_interval_without_data_ms", 500),
    ("grpc.http2.max_ping_strikes", 0),
    # grpc's own bounds, said here because docs/security.md promises them.
    ("grpc.max_metadata_size", 8 * 1024),
    ("grpc.absolute_max_metadata_size", 16 * 1024),
)

CHANNEL_OPTIONS: _Options = (
    *_PEER_PINGS,
    *_COMMON,
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # Retrying is ours: grpc's own would hide attempts from the ledger.
    ("grpc.enable_retries", 0),
)

SERVER_OPTIONS: _Options = (*_PEER_PINGS, *_COMMON, *_SERVER)

FRONT_SERVER_OPTIONS: _Options = (*_CLIENT_PINGS, *_COMMON, *_SERVER)
"""Of servers that clients call. Those are far away, on busy machines, or stopped by Ctrl-Z for a while: none
of that may end their streams. One that vanishes without closing its connection is noticed in 30 s."""
