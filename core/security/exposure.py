"""What a configuration lays open to others than this machine."""

import ipaddress

from pdserve.core.config import ServeConfig


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens on `host`; a name counts only if it is localhost."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def exposures(config: ServeConfig) -> tuple[str, ...]:
    """One warning for each thing that listens beyond loopback without the protection that exists for it."""
    host, security = config.router.host, config.security
    if is_loopback(host):
        return ()
    # With a Ray of its own, a cluster's workers are on loopback.
    open_workers = "" if config.ray_address is None else ", and workers obey whoever reaches them"
    warnings = []
    if not security.tls:
        warnings.append(
            f"what listens on {host} speaks plain text{open_workers}: set security.tls_dir (see "
            "`pdserve certs`), or listen on 127.0.0.1"
        )
    if security.tokens_file is None and not security.client_certificates:
        warnings.append(
            f"whoever reaches {host} may use this cluster: set security.tokens_file or "
            "security.client_certificates, or listen on 127.0.0.1"
        )
    return tuple(warnings)
