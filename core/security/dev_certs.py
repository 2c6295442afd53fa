"""A development certificate authority: ECDSA P-256, made once, never overwritten."""

import datetime
import ipaddress
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from pdserve.core.errors import ConfigError
from pdserve.core.security.tls import WORKER_NAME
from pdserve.core.security.tls_files import CA, CLIENT, CLIENT_CA, SERVER, WORKER

LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
_DNS_NAME = re.compile(
    r"(\*\.)?[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?)*"
)
_CLOCK_SKEW = datetime.timedelta(minutes=5)
_SERVES, _CALLS = ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH


class _Issued(NamedTuple):
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


def make_certificates(folder: Path, hosts: Sequence[str] = (), days: int = 90) -> tuple[Path, ...]:
    """Write ca, server, worker, client-ca and client, each as .pem and .key (mode 0600); returns the paths.

    The server's names are localhost, 127.0.0.1, ::1 and `hosts`. Clients have an authority of their own, so
    that a client's certificate opens no worker. Raises ConfigError for a host that is neither a name nor an
    address, and, before it writes anything, where one of the files is there.
    """
    server_names = _names((*LOCAL_NAMES, *hosts))
    worker_names = _names((WORKER_NAME, *LOCAL_NAMES))
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot make the folder {folder}: {error.strerror}") from error
    names = (CA, SERVER, WORKER, CLIENT_CA, CLIENT)
    paths = tuple(folder / f"{name}{ending}" for name in names for ending in (".pem", ".key"))
    if there := [path.name for path in paths if path.exists()]:
        raise ConfigError(
            f"{folder} holds {', '.join(there)}: nothing is overwritten; choose another folder or remove them"
        )
    until = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days)
    cluster = _issue("pdserve development CA", None, until)
    clients = _issue("pdserve development client CA", None, until)
    issued = (
        cluster,
        _issue("pdserve server", cluster, until, server_names, (_SERVES, _CALLS)),
        _issue(WORKER_NAME, cluster, until, worker_names, (_SERVES, _CALLS)),
        clients,
        _issue("pdserve client", clients, until, (), (_CALLS,)),
    )
    for name, one in zip(names, issued, strict=True):
        _write(folder / f"{name}.pem", one.certificate.public_bytes(serialization.Encoding.PEM), 0o644)
        _write(folder / f"{name}.key", _private_bytes(one.key), 0o600)
    return paths


def _issue(
    name: str,
    authority: _Issued | None,
    until: datetime.datetime,
    names: Sequence[x509.GeneralName] = (),
    purposes: Sequence[x509.ObjectIdentifier] = (),
) -> _Issued:
    """A certificate of `authority`; one that signs itself, and others, where that is None."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    issuer, signing_key = (
        (subject, key) if authority is None else (authority.certificate.subject, authority.key)
    )
    signs = authority is None
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.datetime.now(datetime.UTC) - _CLOCK_SKEW)
        .not_valid_after(until)
        .add_extension(x509.BasicConstraints(ca=signs, path_length=0 if signs else None), critical=True)
        .add_extension(_key_usage(signs), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signing_key.public_key()), critical=False
        )
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    if purposes:
        builder = builder.add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
    return _Issued(builder.sign(signing_key, hashes.SHA256()), key)


def _key_usage(signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        key_cert_sign=signs,
        crl_sign=signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _names(hosts: Sequence[str]) -> tuple[x509.GeneralName, ...]:
    """DNS names and addresses, each once. Raises ConfigError for what is neither."""
    return tuple(_general_name(host) for host in dict.fromkeys(hosts))


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        if _DNS_NAME.fullmatch(host) is None:
            raise ConfigError(
                f"host {host!r} is neither a DNS name nor an IP address: leave ports and schemes out"
            ) from None
        return x509.DNSName(host)


def _private_bytes(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write(path: Path, data: bytes, mode: int) -> None:
    """A new file that has its mode before it has its content."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error
