"""`pdserve serve`: a cluster that lives until SIGINT or SIGTERM."""

import asyncio
import json
import logging
import os
import sys
from pathlib import Path

from pdserve.cluster.cluster import Cluster
from pdserve.cluster.signals import run_until_signal
from pdserve.core.config import ServeConfig
from pdserve.core.errors import ConfigError


def serve(config: ServeConfig) -> int:
    """Run a cluster until a signal ends it; returns the exit status. Raises PdserveError."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    ready_file = None if config.ready_file is None else ReadyFile(Path(config.ready_file))
    cluster = Cluster(config)

    def abandon() -> None:
        cluster.remove_files()
        if ready_file is not None:
            ready_file.remove()

    run_until_signal(_serve(cluster, ready_file), abandon)
    return 0


async def _serve(cluster: Cluster, ready_file: "ReadyFile | None") -> None:
    config = cluster.config
    roles = {"prefill": config.prefill, "decode": config.decode, "mixed": config.mixed}
    workers = " + ".join(f"{count} {role}" for role, count in roles.items() if count)
    _say(f"pdserve starts redis, Ray, a router and the workers ({workers}) for {config.model} …")
    async with cluster:
        try:
            record = cluster.ready_record()
            if ready_file is not None:
                ready_file.write(json.dumps(record) + "\n")
            scheme = "https" if config.security.tls else "http"
            http = "" if record["http"] is None else f" and at {scheme}://{record['http']}/v1"
            _say(f"pdserve serves {record['model']} at {record['grpc']}{http}")
            await asyncio.Event().wait()
        finally:
            if ready_file is not None:
                ready_file.remove()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class ReadyFile:
    """Is there, whole, exactly while the cluster serves; one of an earlier run is removed."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigError, before anything starts, where it could not be written later."""
        self.path = path
        self._part = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            self._part.touch()
            self._part.unlink()
            self.remove()
        except OSError as error:
            raise ConfigError(
                f"cannot write the ready file {path} ({error.strerror}): name one in a folder that is there"
            ) from error

    def write(self, text: str) -> None:
        """A reader sees all of it or none."""
        try:
            self._part.write_text(text)
            self._part.replace(self.path)
        except OSError:
            self._part.unlink(missing_ok=True)
            raise

    def remove(self) -> None:
        """Whether it is there or not."""
        self.path.unlink(missing_ok=True)
