"""How the client commands prove who they are: the options of TLS and of tokens, for `gathers`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pdserve.cli.gathering import option
from pdserve.core.errors import ConfigError

CREDENTIALS = (
    option(
        "tls",
        bool,
        "Connect with TLS; the system's authorities are trusted.",
        default=False,
        flags=("--tls",),
    ),
    option("tls_ca", Path | None, "Connect with TLS; the authority in this PEM file is trusted."),
    option("tls_cert", Path | None, "Certificate to show to a cluster that asks for one, PEM."),
    option("tls_key", Path | None, "Its key."),
    option(
        "token", str | None, "Bearer token. Others can see it in the list of processes: see --token-file."
    ),
    option("token_file", Path | None, "File that holds the bearer token."),
)


def credentials(options: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments `tls` and `token` of Client and AdminClient. Raises ConfigError."""
    from pdserve.client import Tls
    from pdserve.core.security.tokens import read_token

    if options["token"] is not None and options["token_file"] is not None:
        raise ConfigError("--token and --token-file are both given: leave one out")
    token = options["token"] if options["token_file"] is None else read_token(options["token_file"])
    ca, certificate, key = (options[name] for name in ("tls_ca", "tls_cert", "tls_key"))
    named = any(path is not None for path in (ca, certificate, key))
    return {"tls": Tls(ca, certificate, key) if named else options["tls"], "token": token}
