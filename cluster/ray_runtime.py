"""A Ray to live in: one of our own, or somebody's running one."""

import logging
import os
import shutil
import socket
import tempfile
from typing import Any

import ray

from pdserve.core.errors import ConfigError, Unavailable

HEALTH_CHECK = {
    # A raylet's death is noticed in about 1.5 s instead of 16.
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 500,
    "health_check_failure_threshold": 3,
}
OBJECT_STORE_BYTES = 80 * 1024 * 1024
"""The least that Ray takes: nothing of ours travels through the object store."""
CONNECT_TIMEOUT_S = 5.0
LONGEST_FOLDER = 22
"""Characters. Linux takes 107 for a socket's path; 64 are Ray's session and socket names, 21 our folder's."""


class RayRuntime:
    """Starts or joins Ray; `stop` undoes exactly that.

    address None starts a Ray of our own on this machine, whose files live in one temporary folder; anything
    else is the address of a running cluster, which we leave running. An own Ray listens on loopback only, and
    dies with this process, however that ends: the kernel kills its servers, and their children follow them.
    """

    def __init__(self, address: str | None) -> None:
        self._address = address
        self._folder: str | None = None

    def start(self) -> None:
        """Blocks for seconds. Raises ConfigError for what is no address, Unavailable when Ray fails."""
        # Children inherit this: no phoning home.
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        if self._address is None:
            self._start_own()
        else:
            self._join(self._address)

    def stop(self) -> None:
        """Leave or end Ray; idempotent."""
        ray.shutdown()
        self.remove_files()

    def remove_files(self) -> None:
        """All that an own Ray keeps on disk."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _start_own(self) -> None:
        os.environ["RAY_AUTH_MODE"] = "disabled"  # no token file in the home directory
        _spread_over_machines(False)
        short = len(tempfile.gettempdir()) <= LONGEST_FOLDER
        self._folder = tempfile.mkdtemp(prefix="pdserve-ray-", dir=None if short else "/tmp")
        self._init(
            address="local",
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            _temp_dir=self._folder,
            _system_config=HEALTH_CHECK,
        )

    def _join(self, address: str) -> None:
        if "://" in address:
            raise ConfigError(
                f"ray_address is {address!r}: it must be host:port of a Ray cluster that this machine "
                "belongs to, or 'auto'; Ray's remote client is not supported"
            )
        _spread_over_machines(True)
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # a cluster with tokens is joined by its own rules
        if address != "auto":
            _probe(address)
        self._init(address=address)

    def _init(self, **arguments: Any) -> None:
        # The raylet's errors ("A worker died …") would go to stdout; our supervisor reports deaths itself.
        ray._private.worker._worker_logs_enabled = False
        try:
            ray.init(
                log_to_driver=False,
                logging_level=logging.CRITICAL,
                namespace=f"pdserve-{os.getpid()}",
                **arguments,
            )
        except Exception as error:  # Ray raises OSError, RuntimeError, ValueError and its own
            raise Unavailable(f"Ray did not start ({type(error).__name__}: {error})") from error


def _spread_over_machines(allowed: bool) -> None:
    """Where it is not, Ray's servers listen on loopback; by default, on Linux, on every interface.

    Ray has no argument for it. It reads the variable when it is imported: here that is over, in its children
    it is not.
    """
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "1" if allowed else "0"
    ray._private.ray_constants.ENABLE_RAY_CLUSTER = allowed


def _probe(address: str) -> None:
    """Ray itself tries for minutes, and cannot be interrupted."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"ray_address is {address!r}: it must be host:port or 'auto'")
    try:
        socket.create_connection((host, int(port)), CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise Unavailable(
            f"no Ray answers at {address} ({error}): start one there, or leave ray_address out "
            "to get a local one"
        ) from error
