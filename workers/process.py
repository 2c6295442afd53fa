"""A worker as a plain process, and the host that a Ray actor wraps as thinly."""

import asyncio
import ctypes
import json
import logging
import os
import signal
import sys
from collections.abc import Callable

import uvloop

from pdserve.core.tasks import end_task
from pdserve.core.worker_record import WorkerRecord
from pdserve.workers.model_host import ModelHost
from pdserve.workers.models.host_memory import retain_freed_memory
from pdserve.workers.seams import Seams
from pdserve.workers.spec import WorkerSpec
from pdserve.workers.worker import Worker

log = logging.getLogger(__name__)

FAILED = 1
"""Exit status of a worker that could serve no more."""

_LAST_WORDS_S = 5.0
_PR_SET_PDEATHSIG = 1


class WorkerHost:
    """Loads one model and runs one worker on the running event loop.

    A worker whose engine failed cannot be mended: it leaves the cluster in order, and then the process ends,
    so that whoever watches it starts another one.
    """

    def __init__(
        self, spec: WorkerSpec, seams: Seams | None = None, end_process: Callable[[int], object] = os._exit
    ) -> None:
        self._spec = spec
        self._seams = seams
        self._end_process = end_process
        self._worker: Worker | None = None
        self._watch: asyncio.Task[None] | None = None

    async def start(self) -> WorkerRecord:
        """Load, listen, announce. Raises what went wrong, after undoing what was started."""
        logging.basicConfig(
            level=logging.INFO,
            stream=sys.stderr,
            format=f"%(asctime)s {self._spec.worker} %(levelname)s %(message)s",
        )
        retain_freed_memory()
        model = await asyncio.to_thread(ModelHost.load, self._spec)
        worker = Worker(self._spec, model, seams=self._seams)
        try:
            await worker.start()
        except BaseException:
            await worker.stop()
            raise
        self._worker = worker
        self._watch = asyncio.create_task(self._end_with(worker), name="worker-failure")
        return worker.record()

    async def stop(self) -> None:
        """Leave the cluster and give everything back. Idempotent."""
        worker, self._worker = self._worker, None
        await end_task(self._watch)
        if worker is not None:
            await worker.stop()

    async def _end_with(self, worker: Worker) -> None:
        error = await worker.failed()
        log.critical("worker %s ends: %s", self._spec.worker, error.message)
        try:
            async with asyncio.timeout(_LAST_WORDS_S):
                await worker.stop()
        except Exception:
            log.exception("it did not end in order")
        self._end_process(FAILED)


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
    record = await host.start()
    print(json.dumps(record.to_dict()), flush=True)
    await ended.wait()
    await host.stop()
