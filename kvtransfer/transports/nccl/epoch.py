"""One communicator between D and P, from the meeting of the two to its abort: an epoch of the pair."""

import logging
import threading
from collections.abc import Callable

from pdserve.core.clock import Clock
from pdserve.kvtransfer.gpu.base import (
    Communicator,
    CommunicatorFailed,
    Communicators,
    Gpu,
    GpuRows,
    GpuStream,
)
from pdserve.kvtransfer.gpu.staging import Staging

_log = logging.getLogger(__name__)

_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 20e-6, 1e-3
_LET_GO_S = 5.0
"""How long an aborted communicator's work may stay on the device before its memory is given up."""


class Epoch:
    """Used by its pair's one thread; `stop` may be set by any. Owns communicator, stream and staging memory.

    A peer that dies or stops shows nowhere in NCCL. So every wait here polls, for `timeout_s` at most, and
    until `stop`: who holds the pair's socket sets it when the peer is gone. After any error there is nothing
    but `end`, and a new epoch.
    """

    def __init__(
        self, gpu: Gpu, communicators: Communicators, clock: Clock, timeout_s: float, stop: threading.Event
    ) -> None:
        self._staging = Staging(gpu)
        self._communicators = communicators
        self._clock = clock
        self._timeout_s = timeout_s
        self._stop = stop
        self._communicator: Communicator | None = None
        self._ended = False

    @property
    def stream(self) -> GpuStream:
        """For copies from and to staged rows."""
        return self._staging.stream

    def staged(self, num_rows: int, row_bytes: int) -> GpuRows:
        """Staging memory; the same as the last time unless it has to grow. Raises CommunicatorFailed."""
        self._joined()
        return self._staging.rows(num_rows, row_bytes)

    def join(self, unique_id: bytes, rank: int) -> None:
        """Meet the other rank. Raises CommunicatorFailed."""
        if self._ended:
            raise CommunicatorFailed("the epoch has ended")
        self._communicator = self._communicators.join(unique_id, rank)
        self._settle("the peer did not join")

    def send(self, rows: GpuRows) -> None:
        """Send staged rows; returns when they have left. Raises CommunicatorFailed."""
        self._joined().send(rows.pointer, rows.num_rows * rows.row_bytes, self._staging.stream)
        self._settle("the blocks were not taken")

    def receive(self, rows: GpuRows) -> None:
        """Receive to staged rows; returns when they are there. Raises CommunicatorFailed."""
        self._joined().receive(rows.pointer, rows.num_rows * rows.row_bytes, self._staging.stream)
        self._settle("the blocks did not come")

    def end(self) -> None:
        """Abort, and give back what the device lets go of. Idempotent."""
        if self._ended:
            return
        self._ended = True
        try:
            if self._communicator is not None:
                self._communicator.abort()
            last = self._staging.stream.record()
            deadline = self._clock.now() + _LET_GO_S
            while not last.done():
                if self._clock.now() > deadline:
                    raise CommunicatorFailed(f"its work is still on the device after {_LET_GO_S} s")
                threading.Event().wait(_LONGEST_PAUSE_S)
        except RuntimeError as error:
            # Its staging memory is never used again: something may still write there.
            _log.error("kv transfer: a communicator cannot be ended, its memory is lost: %s", error)
            return
        self._staging.close()

    def _joined(self) -> Communicator:
        if self._communicator is None or self._ended:
            raise CommunicatorFailed("there is no communicator, or no longer")
        return self._communicator

    def _settle(self, failure: str) -> None:
        """Wait until what was begun is posted and has ended on the device."""
        communicator, deadline = self._joined(), self._clock.now() + self._timeout_s
        self._poll(lambda: not communicator.busy(), deadline, failure)
        posted = self._staging.stream.record()
        # An error of the network shows while the device waits for the bytes.
        self._poll(lambda: not communicator.busy() and posted.done(), deadline, failure)

    def _poll(self, done: Callable[[], bool], deadline: float, failure: str) -> None:
        pause = _SHORTEST_PAUSE_S
        while not done():
            if self._stop.wait(pause):
                raise CommunicatorFailed(f"{failure}: the pair was given up")
            if self._clock.now() > deadline:
                raise CommunicatorFailed(f"{failure} within {self._timeout_s} s")
            pause = min(2 * pause, _LONGEST_PAUSE_S)
