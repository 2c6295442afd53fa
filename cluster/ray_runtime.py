"""A Ray to live in: one of our own, or somebody's running one."""

import logging
import os
import shutil
import tempfile

import ray

HEALTH_CHECK = {
    # A raylet's death is noticed in about 1.5 s instead of 16.
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 500,
    "health_check_failure_threshold": 3,
}
OBJECT_STORE_BYTES = 80 * 1024 * 1024
"""The least that Ray takes: nothing of ours travels through the object store."""


class RayRuntime:
    """Starts or joins Ray; `stop` undoes exactly that.

    address None starts a Ray of our own on this machine, whose files live in one temporary folder; anything
    else is the address of a running cluster, which we leave running.
    """

    def __init__(self, address: str | None) -> None:
        self._address = address
        self._folder: str | None = None

    def start(self) -> None:
        # Children inherit these: no token file in the home directory, no phoning home.
        os.environ["RAY_AUTH_MODE"] = "disabled"
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        common = {
            "log_to_driver": False,
            "logging_level": logging.ERROR,
            "namespace": f"pdserve-{os.getpid()}",
        }
        if self._address is not None:
            ray.init(address=self._address, **common)
            return
        self._folder = tempfile.mkdtemp(prefix="pdserve-ray-")
        ray.init(
            address="local",
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            _temp_dir=self._folder,
            _system_config=HEALTH_CHECK,
            **common,
        )

    def stop(self) -> None:
        """Leave or end Ray; idempotent."""
        ray.shutdown()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None
