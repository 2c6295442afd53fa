"""TLS of one cluster: what its configuration names, loaded and checked once per process."""

from dataclasses import dataclass

from cryptography import x509

from pdserve.core.config import SecurityConfig
from pdserve.core.errors import ConfigError
from pdserve.core.security.tls import (
    WORKER_NAME,
    ClientTls,
    Identity,
    ServerTls,
    SocketTls,
    read_ca,
    read_pem,
)
from pdserve.core.security.tls_files import TlsFiles


@dataclass(frozen=True, slots=True)
class WorkerTls:
    """Between workers, and from routers to workers: both ends show a certificate of the cluster's CA."""

    server: ServerTls
    client: ClientTls
    sockets: SocketTls

    @classmethod
    def load(cls, config: SecurityConfig) -> "WorkerTls | None":
        """None where TLS is off. Raises ConfigError for files that are missing or wrong."""
        files = TlsFiles.of(config)
        if files is None:
            return None
        identity = Identity.load(files.worker_certificate, files.worker_key)
        names = names_in(files.worker_certificate)
        if WORKER_NAME not in names:
            raise ConfigError(
                f"{files.worker_certificate} is for {', '.join(names) or 'no name'}: a worker's certificate "
                f"must have {WORKER_NAME} among its DNS names; see security.worker_certificate"
            )
        ca = read_ca(files.ca)
        return cls(
            ServerTls(identity, ca), ClientTls(ca, identity, WORKER_NAME), SocketTls.load(identity, ca)
        )


@dataclass(frozen=True, slots=True)
class FrontTls:
    """Between clients and the router or the membership service."""

    server: ServerTls
    client: ClientTls
    """For the cluster's own calls: they know the certificate, so its name is checked and not the address."""

    @classmethod
    def load(cls, config: SecurityConfig) -> "FrontTls | None":
        """None where TLS is off. Raises ConfigError for files that are missing or wrong."""
        files = TlsFiles.of(config)
        if files is None:
            return None
        identity = Identity.load(files.certificate, files.key)
        names = names_in(files.certificate)
        if not names:
            raise ConfigError(
                f"{files.certificate} has no DNS name that clients could check: see `pdserve certs`"
            )
        ca = read_ca(files.ca)
        # The cluster's own calls show a certificate of the cluster's CA, whoever signs the clients'.
        callers = read_ca(files.client_ca) + ca if config.client_certificates else None
        return cls(ServerTls(identity, callers), ClientTls(ca, identity, names[0]))


def names_in(certificate: str) -> tuple[str, ...]:
    """DNS names of the first certificate in a PEM file."""
    try:
        parsed = x509.load_pem_x509_certificates(read_pem(certificate, "certificate"))[0]
        found = parsed.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        return ()
    except ValueError:
        raise ConfigError(f"{certificate} holds no valid certificate") from None
    return tuple(found.value.get_values_for_type(x509.DNSName))
