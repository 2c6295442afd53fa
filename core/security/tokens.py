"""Bearer tokens: a file of names and secrets, and the one check of them."""

import hashlib
import hmac
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from pdserve.core.errors import ConfigError, Unauthenticated

MIN_TOKEN_CHARACTERS = 16
_NAME = re.compile(r"[A-Za-z0-9_.@-]{1,64}")
_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*")
"""RFC 6750, section 2.1; it has no colon, so a hashed line cannot be taken for a plain one."""
_SHA256 = re.compile(r"[0-9a-fA-F]{64}")
_FORM = "write name:token, or name:sha256: and 64 hexadecimal digits, one a line"


@dataclass(frozen=True, slots=True)
class _Entry:
    name: str
    digest: bytes = field(repr=False)


class TokenTable:
    """Names by token. Keeps SHA-256 digests only; no message, `repr` or comparison shows a token."""

    def __init__(self, entries: Iterable[tuple[str, bytes]]) -> None:
        """`entries`: (name, SHA-256 of a token). A name may have two, while one replaces the other."""
        self._entries = tuple(_Entry(name, digest) for name, digest in entries)

    def __repr__(self) -> str:
        return f"TokenTable({', '.join(self.names)})"

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(entry.name for entry in self._entries))

    @classmethod
    def load(cls, path: str | Path) -> "TokenTable":
        """Raises ConfigError for a file that cannot be read or holds no or malformed entries."""
        try:
            text = Path(path).read_text()
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "not UTF-8"
            raise ConfigError(f"cannot read the tokens file {path} ({why}): {_FORM}") from None
        return cls(parse(text, str(path)))

    def with_token(self, name: str, token: str) -> "TokenTable":
        """This table and one more token."""
        entries = [(entry.name, entry.digest) for entry in self._entries]
        return TokenTable([*entries, (name, _digest(token))])

    def check(self, authorization: str | None) -> str:
        """The name whose token an `Authorization` header carries. Raises Unauthenticated.

        Every entry is compared, each in constant time, so the time says neither which one nor how much of one
        was right.
        """
        token = bearer_token(authorization)
        if token is None:
            raise Unauthenticated("this needs a token: send the header 'Authorization: Bearer TOKEN'")
        digest = _digest(token)
        found: str | None = None
        for entry in self._entries:
            if hmac.compare_digest(entry.digest, digest):
                found = entry.name
        if found is None:
            raise Unauthenticated("the token is not one of this cluster's: ask its operator for one")
        return found


def parse(text: str, where: str) -> list[tuple[str, bytes]]:
    """(name, digest) of each line; empty lines and those with # in front are skipped. Raises ConfigError."""
    entries = []
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.strip()
        if line and not line.startswith("#"):
            entries.append(_entry(line, f"{where}, line {number}"))
    if not entries:
        raise ConfigError(f"{where} holds no token: {_FORM}")
    return entries


def bearer_token(authorization: str | None) -> str | None:
    """The token in an `Authorization` header; None where there is none."""
    scheme, _, token = (authorization or "").strip().partition(" ")
    return token.strip() or None if scheme.lower() == "bearer" else None


def is_token(text: str) -> bool:
    """Whether a header can carry it."""
    return _TOKEN.fullmatch(text) is not None


def read_token(path: str | Path) -> str:
    """A caller's own token: the only line of a file. Raises ConfigError, which does not repeat it."""
    try:
        token = Path(path).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ConfigError(f"cannot read the token file {path} ({why})") from None
    if not is_token(token):
        raise ConfigError(f"{path} must hold one token and nothing else: letters, digits and -._~+/= only")
    return token


def _entry(line: str, where: str) -> tuple[str, bytes]:
    """What is wrong is said without the line, which may be a secret."""
    name, separator, secret = line.partition(":")
    if not separator or _NAME.fullmatch(name) is None:
        raise ConfigError(f"{where} does not begin with a name and a colon: {_FORM}")
    kind, hashed, hexadecimal = secret.partition(":")
    if hashed:
        if kind != "sha256" or _SHA256.fullmatch(hexadecimal) is None:
            raise ConfigError(f"{where}: the entry of {name} is malformed: {_FORM}")
        return name, bytes.fromhex(hexadecimal)
    if not is_token(secret):
        raise ConfigError(f"{where}: the token of {name} must be letters, digits and -._~+/= only")
    if len(secret) < MIN_TOKEN_CHARACTERS:
        raise ConfigError(
            f"{where}: the token of {name} has {len(secret)} characters, it must have at least "
            f"{MIN_TOKEN_CHARACTERS}: make one with `openssl rand -hex 32`"
        )
    return name, _digest(secret)


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
