"""How a client proves who it is, and how it checks whom it talks to."""

import os
from dataclasses import dataclass

from pdserve.core.errors import ConfigError, InvalidRequest
from pdserve.core.security.tls import ClientTls, Identity, read_ca
from pdserve.core.security.tokens import is_token

Path = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class Tls:
    """PEM files for an encrypted connection.

    ca: the authorities that the server's certificate must come from; None: those that the system trusts.
    certificate, key: what to show to a server that asks clients for certificates; both or neither.
    server_name: the name to look for in the server's certificate; None: the host of the target.
    """

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    server_name: str | None = None

    def load(self) -> ClientTls:
        """Raises ConfigError for files that are missing or wrong."""
        if (self.certificate is None) != (self.key is None):
            raise ConfigError("a client certificate needs its key, and a key its certificate: give both")
        identity = None
        if self.certificate is not None and self.key is not None:
            identity = Identity.load(os.fspath(self.certificate), os.fspath(self.key))
        ca = None if self.ca is None else read_ca(os.fspath(self.ca))
        return ClientTls(ca, identity, self.server_name)


def load_tls(tls: Tls | bool) -> ClientTls | None:
    """True: with the authorities that the system trusts; False: plain text. Raises ConfigError."""
    if isinstance(tls, bool):
        return ClientTls() if tls else None
    return tls.load()


def check_token(token: str | None) -> str | None:
    """Raises InvalidRequest for what no header can carry, without repeating it."""
    if token is not None and not is_token(token):
        raise InvalidRequest("the token is malformed: letters, digits and -._~+/= only, without a newline")
    return token
