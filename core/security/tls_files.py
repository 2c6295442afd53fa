"""Where a cluster's PEM files lie, and what they are called in a folder that `pdserve certs` made."""

from pathlib import Path
from typing import NamedTuple

from pdserve.core.config import SecurityConfig

CA = "ca"
SERVER = "server"
WORKER = "worker"
CLIENT_CA = "client-ca"
CLIENT = "client"


class TlsFiles(NamedTuple):
    """Paths; see SecurityConfig for what each is."""

    certificate: str
    key: str
    ca: str
    worker_certificate: str
    worker_key: str
    client_ca: str

    @classmethod
    def of(cls, config: SecurityConfig) -> "TlsFiles | None":
        """None where TLS is off. A key that is given wins over `tls_dir`."""
        if not config.tls:
            return None
        folder = None if config.tls_dir is None else Path(config.tls_dir)

        def place(given: str | None, name: str, otherwise: str = "") -> str:
            return given or (otherwise if folder is None else str(folder / name))

        certificate = place(config.tls_certificate, f"{SERVER}.pem")
        key = place(config.tls_key, f"{SERVER}.key")
        ca = place(config.tls_ca, f"{CA}.pem")
        return cls(
            certificate,
            key,
            ca,
            place(config.worker_certificate, f"{WORKER}.pem", certificate),
            place(config.worker_key, f"{WORKER}.key", key),
            place(config.client_ca, f"{CLIENT_CA}.pem", ca),
        )
