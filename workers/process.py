"""A worker as a plain process, and the host that a Ray actor wraps as thinly."""

import asyncio
import ctypes
import json
import logging
import signal
import sys

import uvloop

from pdserve.core.worker_record import WorkerRecord
from pdserve.workers.models.host_memory import retain_freed_memory
from pdserve.workers.seams import Seams
from pdserve.workers.spec import WorkerSpec
from pdserve.workers.worker import Worker

_PR_SET_PDEATHSIG = 1


class WorkerHost:
    """Owns one worker on the running event loop."""

    def __init__(self, spec: WorkerSpec, seams: Seams | None = None) -> None:
        logging.basicConfig(
            level=logging.INFO, stream=sys.stderr, format=f"%(asctime)s {spec.worker} %(levelname)s %(message)s"
        )
        retain_freed_memory()
        self._worker = Worker(spec, seams=seams)

    async def start(self) -> None:
        """Load, listen, announce. Raises what went wrong, after undoing what was started."""
        try:
            await self._worker.start()
        except BaseException:
            await self._worker.stop()
            raise

    async def stop(self) -> None:
        await self._worker.stop()

    def record(self) -> WorkerRecord:
        return self._worker.record()


def run_worker(spec: WorkerSpec, seams: Seams | None = None) -> None:
    """Run until SIGTERM or SIGINT, or until the parent dies. Prints one JSON line, the record, when ready."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    uvloop.run(_run(spec, seams))


async def _run(spec: WorkerSpec, seams: Seams | None) -> None:
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    host = WorkerHost(spec, seams)
    await host.start()
    print(json.dumps(host.record().to_dict()), flush=True)
    await ended.wait()
    await host.stop()
