"""One end of an epoch: the socket, the communicator and the thread for it, which live and end together."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import TypeVar

from pdserve.core.clock import Clock
from pdserve.kvtransfer.gpu.base import Communicators, Gpu
from pdserve.kvtransfer.transports.copying import CopyThread, settle
from pdserve.kvtransfer.transports.nccl.epoch import Epoch
from pdserve.kvtransfer.transports.nccl.stream import ControlStream

T = TypeVar("T")


class Link:
    """Joins when it is started; ends once, at the first thing that goes wrong, or when it is told to.

    What ends it ends all: the socket, so that the peer ends too; what runs in the thread; then the
    communicator is aborted there. Nothing of it is used again.
    """

    def __init__(
        self,
        name: str,
        stream: ControlStream,
        gpu: Gpu,
        communicators: Communicators,
        clock: Clock,
        timeout_s: float,
    ) -> None:
        self._stream = stream
        self._stop = threading.Event()
        self._thread = CopyThread(name)
        self._send_lock = asyncio.Lock()
        self._joined: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._running: asyncio.Task[None] | None = None
        self.epoch = Epoch(gpu, communicators, clock, timeout_s, self._stop)
        self.lost: str | None = None
        """Why it has ended."""

    def start(
        self,
        unique_id: bytes,
        rank: int,
        read: Callable[[ControlStream], Awaitable[None]],
        ended: Callable[[str], None],
    ) -> None:
        """Join, and let `read` take what the peer sends until it raises OSError. `ended` is told why."""
        self._running = asyncio.get_running_loop().create_task(self._run(unique_id, rank, read, ended))

    async def joined(self) -> None:
        """Wait for the peer. Raises ConnectionError where it does not come."""
        await asyncio.wait({self._joined})
        self._joined.result()

    async def in_thread(self, work: Callable[[], T]) -> T:
        """Run `work` to its end, soon if the link ends. Cancelled, or where it raises RuntimeError (as
        ConnectionError), the link has ended: the peer waits for something that will not come."""
        running: asyncio.Future[T] | None = None
        try:
            running = self._thread.submit(work)
            await settle(running, self._stop)
            return running.result()
        except RuntimeError as error:
            self.end(str(error))
            raise ConnectionError(str(error)) from error
        except asyncio.CancelledError:
            self.end("a transfer was given up")
            if running is not None:
                running.exception()  # how it ended concerns nobody any more
            raise

    async def send(self, record: bytes) -> None:
        """After an error or a cancellation the link has ended."""
        async with self._send_lock:
            if self.lost is not None:
                raise ConnectionError(self.lost)
            try:
                await self._stream.send(record)
            except BaseException:
                self.end("a record could not be sent")
                raise

    def end(self, reason: str) -> None:
        """Begin to end. Idempotent: the first reason counts."""
        if self.lost is None:
            self.lost = reason
            self._stop.set()
            self._stream.sever()

    async def close(self, reason: str) -> None:
        """End, and wait until all is given back. Idempotent; only after `start`."""
        self.end(reason)
        if self._running is not None:
            await settle(self._running)

    async def _run(
        self,
        unique_id: bytes,
        rank: int,
        read: Callable[[ControlStream], Awaitable[None]],
        ended: Callable[[str], None],
    ) -> None:
        joining = asyncio.get_running_loop().create_task(self._join(unique_id, rank))
        try:
            await read(self._stream)
        except OSError as error:
            self.end(f"the peer was lost: {error}")
        finally:
            self.end("it was given up")
            await settle(joining)
            if not self._joined.done():
                self._joined.set_exception(ConnectionError(self.lost))
                self._joined.exception()  # not everybody waits for it
            ended(self.lost or "")
            await self._thread.run(self.epoch.end)
            self._thread.close()
            async with self._send_lock:
                self._stream.close()

    async def _join(self, unique_id: bytes, rank: int) -> None:
        try:
            await self.in_thread(lambda: self.epoch.join(unique_id, rank))
        except ConnectionError:
            return  # the link has ended, and says why
        if not self._joined.done():
            self._joined.set_result(None)
