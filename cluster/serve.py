"""`pdserve serve`: a cluster that lives until SIGINT or SIGTERM."""

import asyncio
import json
import logging
import os
import signal
import sys
from pathlib import Path

from pdserve.cluster.cluster import Cluster
from pdserve.core.config import ServeConfig

log = logging.getLogger(__name__)


def serve(config: ServeConfig) -> int:
    """Run a cluster until a signal ends it; returns the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    asyncio.run(_serve(config))
    return 0


async def _serve(config: ServeConfig) -> None:
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    main = asyncio.current_task()
    assert main is not None
    starting = True

    def on_signal() -> None:
        ended.set()
        if starting:
            main.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
    cluster = Cluster(config)
    try:
        await cluster.start()
        starting = False
        # Ray installs handlers of its own when it starts.
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, on_signal)
        record = cluster.ready_record()
        if config.ready_file is not None:
            write_atomically(Path(config.ready_file), json.dumps(record) + "\n")
        print(f"pdserve serves {record['model']} at {record['grpc']}", file=sys.stderr, flush=True)
        await ended.wait()
    except asyncio.CancelledError:
        if not ended.is_set():
            raise
    finally:
        starting = False
        await cluster.stop()
        if config.ready_file is not None:
            remove(Path(config.ready_file))


def remove(path: Path) -> None:
    """Whether it is there or not."""
    path.unlink(missing_ok=True)


def write_atomically(path: Path, text: str) -> None:
    """A reader sees the whole file or none."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(text)
    part.replace(path)
