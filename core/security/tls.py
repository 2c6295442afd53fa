"""TLS as values: who one is, whom one believes. Standard library only; nothing here opens a connection."""

import ssl
from dataclasses import dataclass, field
from pathlib import Path

from pdserve.core.errors import ConfigError

WORKER_NAME = "pdserve-worker"
"""The name that callers of workers check instead of an address: workers move, their certificates need not."""


@dataclass(frozen=True, slots=True)
class Identity:
    """A certificate (chain) and its key, in PEM, and the files that they came from."""

    certificate: bytes = field(repr=False)
    key: bytes = field(repr=False)
    certificate_file: str
    key_file: str

    @classmethod
    def load(cls, certificate: str, key: str) -> "Identity":
        """Raises ConfigError where a file cannot be read, or key and certificate do not belong together."""
        read = (read_pem(certificate, "certificate"), read_pem(key, "key"))
        try:
            # No password: without one OpenSSL would ask the terminal.
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password="")
        except (ssl.SSLError, ValueError):
            raise ConfigError(
                f"{certificate} and {key} are not a certificate and its own unencrypted key, in PEM: "
                "`pdserve certs DIR` makes some for development"
            ) from None
        return cls(*read, certificate, key)


@dataclass(frozen=True, slots=True)
class ServerTls:
    """How a server shows itself, and which CA's certificates callers must have (None: they need none)."""

    identity: Identity
    client_ca: bytes | None = None

    def context(self) -> ssl.SSLContext:
        """The same for a server that is not gRPC's."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(self.identity.certificate_file, self.identity.key_file, password="")
        if self.client_ca is not None:
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(cadata=self.client_ca.decode())
        return context


@dataclass(frozen=True, slots=True)
class ClientTls:
    """How a caller checks servers and shows itself."""

    ca: bytes | None = None
    """None: the authorities that the system trusts."""
    identity: Identity | None = None
    server_name: str | None = None
    """The name that the server's certificate must have; None: the host of the address."""


@dataclass(frozen=True, slots=True)
class SocketTls:
    """Contexts of plain sockets between workers: both ends show a certificate of the cluster's CA."""

    server: ssl.SSLContext
    client: ssl.SSLContext

    @classmethod
    def load(cls, identity: Identity, ca: bytes) -> "SocketTls":
        server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server.verify_mode = ssl.CERT_REQUIRED
        server.num_tickets = 0  # nobody resumes these
        client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # requires a certificate and checks its name
        for context in (server, client):
            context.minimum_version = ssl.TLSVersion.TLSv1_3
            context.load_cert_chain(identity.certificate_file, identity.key_file, password="")
            context.load_verify_locations(cadata=ca.decode())
        return cls(server, client)


def read_pem(path: str, what: str) -> bytes:
    """Raises ConfigError where it cannot be read or is no PEM."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read the {what} {path}: {error.strerror}") from None
    if not data.startswith(b"-----BEGIN ") and b"\n-----BEGIN " not in data:
        raise ConfigError(f"{path} is not PEM: a {what} begins with -----BEGIN")
    return data


def read_ca(path: str) -> bytes:
    """Certificates of authorities. Raises ConfigError where the file holds none."""
    data = read_pem(path, "certificate authority")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=data.decode("ascii"))
    except (ssl.SSLError, ValueError):
        raise ConfigError(f"{path} holds no valid certificate of an authority") from None
    return data
