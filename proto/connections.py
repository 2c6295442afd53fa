"""The one place where gRPC channels are made and gRPC servers get their ports, encrypted or not."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import grpc

from pdserve.core.security.tls import ClientTls, ServerTls

AUTHORIZATION = "authorization"
"""Metadata key of a caller's token: `Bearer TOKEN`."""

Options = Sequence[tuple[str, Any]]


def connect(
    target: str, options: Options, tls: ClientTls | None = None, token: str | None = None
) -> grpc.aio.Channel:
    """A channel of the running event loop; its calls carry `token`. Without `tls` it is plain text."""
    if tls is None:
        channel = grpc.aio.insecure_channel(target, options=options)
    else:
        channel = grpc.aio.secure_channel(target, _caller(tls), options=[*options, *_checked_name(tls)])
    return channel if token is None else cast(grpc.aio.Channel, _Authorized(channel, token))


def connect_blocking(
    target: str, options: Options, tls: ClientTls | None = None, token: str | None = None
) -> grpc.Channel:
    """As `connect`, for callers without an event loop."""
    if tls is None:
        channel = grpc.insecure_channel(target, options=options)
    else:
        channel = grpc.secure_channel(target, _caller(tls), options=[*options, *_checked_name(tls)])
    return channel if token is None else cast(grpc.Channel, _Authorized(channel, token))


def listen(server: grpc.aio.Server, address: str, tls: ServerTls | None) -> int:
    """Give a server a port, and return its number. Raises RuntimeError where the address cannot be had."""
    if tls is None:
        return server.add_insecure_port(address)
    identity = tls.identity
    credentials = grpc.ssl_server_credentials(
        [(identity.key, identity.certificate)],
        root_certificates=tls.client_ca,
        require_client_auth=tls.client_ca is not None,
    )
    return server.add_secure_port(address, credentials)


class _Authorized:
    """A channel whose calls carry a token.

    Not an interceptor: those wrap the streams themselves. Not call credentials: those refuse plain text,
    which is what a loopback cluster speaks.
    """

    def __init__(self, channel: Any, token: str) -> None:
        self._channel = channel
        self._metadata = ((AUTHORIZATION, f"Bearer {token}"),)

    def __getattr__(self, name: str) -> Any:
        """Everything that makes no calls is the channel's own."""
        return getattr(self._channel, name)

    async def __aenter__(self) -> "_Authorized":
        await self._channel.__aenter__()
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self._channel.__aexit__(*error)

    def __enter__(self) -> "_Authorized":
        self._channel.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._channel.__exit__(*error)

    def unary_unary(self, *arguments: Any, **options: Any) -> Callable[..., Any]:
        return self._bind(self._channel.unary_unary(*arguments, **options))

    def unary_stream(self, *arguments: Any, **options: Any) -> Callable[..., Any]:
        return self._bind(self._channel.unary_stream(*arguments, **options))

    def stream_unary(self, *arguments: Any, **options: Any) -> Callable[..., Any]:
        return self._bind(self._channel.stream_unary(*arguments, **options))

    def stream_stream(self, *arguments: Any, **options: Any) -> Callable[..., Any]:
        return self._bind(self._channel.stream_stream(*arguments, **options))

    def _bind(self, call: Callable[..., Any]) -> Callable[..., Any]:
        return functools.partial(call, metadata=self._metadata)


def _caller(tls: ClientTls) -> grpc.ChannelCredentials:
    own = tls.identity
    return grpc.ssl_channel_credentials(
        root_certificates=tls.ca,
        private_key=None if own is None else own.key,
        certificate_chain=None if own is None else own.certificate,
    )


def _checked_name(tls: ClientTls) -> Options:
    return () if tls.server_name is None else (("grpc.ssl_target_name_override", tls.server_name),)
