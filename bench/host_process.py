"""Routers and workers as plain processes, without Ray: each runs the host that a Ray actor wraps."""

import asyncio
import logging
import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

import uvloop

from pdserve.bench.child_process import follow_parent
from pdserve.bench.fetch_hold import FetchHold
from pdserve.core.errors import Unavailable
from pdserve.router.process import RouterHost, RouterSpec
from pdserve.workers.process import WorkerHost
from pdserve.workers.seams import Seams
from pdserve.workers.spec import WorkerSpec

_START_S = 120.0
_STOP_S = 15.0


class HostProcess:
    """One child. A context manager: made ready at its beginning, ended with it, or with this process."""

    def __init__(self, name: str, main: Callable[..., None], spec: RouterSpec | WorkerSpec) -> None:
        """Starts it, and does not wait. `main` is run_router or run_worker."""
        self._name = name
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=main, args=(theirs, spec), daemon=True)
        self._process.start()
        theirs.close()
        self.address = ""
        """host:port, when it is ready."""

    def ask(self, what: Any) -> None:
        """Tell it something; returns when it has heard."""
        try:
            self._pipe.send(what)
            self._pipe.recv()
        except (EOFError, OSError) as error:
            raise self._ended() from error

    def __enter__(self) -> "HostProcess":
        try:
            if not self._pipe.poll(_START_S):
                raise Unavailable(f"{self._name} was not ready after {_START_S:g} s")
            self.address = str(self._pipe.recv())
        except BaseException as error:
            self.__exit__(None, None, None)
            if isinstance(error, EOFError | OSError):
                raise self._ended() from error
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pipe.close()
        self._process.join(_STOP_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _ended(self) -> Unavailable:
        return Unavailable(f"{self._name} has ended; stderr has its reason")


def run_worker(pipe: Connection, spec: WorkerSpec) -> None:
    """A worker that holds its fetches where it is asked to, until the pipe's other end is closed."""
    follow_parent()
    hold = FetchHold()
    host = WorkerHost(spec, Seams(observer=hold, importers=hold.wrap))

    async def stop() -> None:
        hold.release()
        await host.stop()

    uvloop.run(_serve(pipe, lambda: _start_worker(host), stop, hold.prepare))


def run_router(pipe: Connection, spec: RouterSpec) -> None:
    """A router, as `run_worker`."""
    follow_parent()
    host = RouterHost(spec)
    uvloop.run(_serve(pipe, lambda: _start_router(host), host.stop, lambda what: None))


async def _serve(
    pipe: Connection,
    start: Callable[[], Any],
    stop: Callable[[], Any],
    hear: Callable[[Any], None],
) -> None:
    logging.basicConfig(level=logging.WARNING)
    pipe.send(await start())
    try:
        while True:
            hear(await asyncio.to_thread(pipe.recv))
            pipe.send(None)
    except EOFError:
        await stop()


async def _start_worker(host: WorkerHost) -> str:
    return (await host.start()).endpoint


async def _start_router(host: RouterHost) -> str:
    await host.start()
    return host.endpoint
