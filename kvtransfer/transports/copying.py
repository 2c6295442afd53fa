"""Copies off the event loop that are never left running behind their caller's back."""

import asyncio
import contextlib
import functools
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from pdserve.core.errors import PdserveError
from pdserve.kvtransfer.digest import as_bytes
from pdserve.kvtransfer.pool.storage import KvStorage
from pdserve.kvtransfer.transports.base import Grant

T = TypeVar("T")

_WORD = 1 << 63
_BATCH_BYTES = 16 << 20
"""Copied between two looks at whether the fetch is still wanted: a few milliseconds."""


class CopyThread:
    """One thread for one peer's copies: no stall of the event loop, no queue behind other work.

    An executor would do the same in three times the time, which counts where a copy takes as long.
    """

    def __init__(self, name: str) -> None:
        """The thread starts with its first work."""
        self._name = name
        self._work: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closed = False

    def submit(self, work: Callable[[], T]) -> asyncio.Future[T]:
        """Start `work`. Whoever owns memory that it touches waits for it with `settle`."""
        if self._closed:
            raise RuntimeError(f"the copy thread {self._name} is closed and takes no more work")
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._work.put(lambda: _carry_out(work, future))
        return future

    async def run(self, work: Callable[[], T], stop: threading.Event | None = None) -> T:
        """Run `work` to its end, also when cancelled; `stop` is set on cancellation to make that soon."""
        future = self.submit(work)
        await settle(future, stop)
        return future.result()

    def close(self) -> None:
        """No more work; the thread ends after what it is doing. Idempotent."""
        self._closed = True
        self._work.put(None)

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            work()


def _carry_out(work: Callable[[], T], future: asyncio.Future[T]) -> None:
    """In the copy thread: the future gets the result in its own."""
    try:
        result = work()
    except BaseException as error:
        tell = functools.partial(future.set_exception, error)
    else:
        tell = functools.partial(future.set_result, result)
    with contextlib.suppress(RuntimeError):  # the loop was closed and took everything with it
        future.get_loop().call_soon_threadsafe(tell)


async def settle(future: asyncio.Future[Any], stop: threading.Event | None = None) -> None:
    """Wait until `future` is done, whatever its result; a cancellation is raised only then."""
    interrupted: asyncio.CancelledError | None = None
    while not future.done():
        try:
            await asyncio.wait({future})
        except asyncio.CancelledError as error:
            interrupted = error
            if stop is not None:
                stop.set()
    if not future.cancelled():
        future.exception()  # seen: who asks for no result leaves no error that nobody handled
    if interrupted is not None:
        raise interrupted


class Copied(NamedTuple):
    """`reason`: why the blocks must not be used, None if they are right. `digests` of what was written."""

    reason: str | None
    digests: bytes | None = None


def copy_segments(
    grant: Grant,
    source: NDArray[np.uint8],
    storage: KvStorage,
    distrust: Callable[[], str | None],
    is_unwanted: Callable[[], bool],
) -> Copied:
    """Copy the grant's blocks out of `source`, uint8 [num_blocks, block_bytes], into D's `storage`.

    `distrust` says why bytes read now would not be the granted ones, None if they are; it is asked before and
    after. `is_unwanted` is asked between batches. Digests in the same pass where the grant wants them and D's
    pool is in host memory.
    """
    reason = refusal(
        grant, sources=len(source), destinations=storage.num_blocks, block_tokens=storage.layout.block_tokens
    )
    if (reason := reason or distrust()) is not None:
        return Copied(reason)
    digests: list[bytes] | None = [] if grant.digest and storage.on_host else None
    table, batch = grant.table, max(1, _BATCH_BYTES // storage.layout.block_bytes)
    for start in range(0, len(table), batch):
        if is_unwanted():
            return Copied("the fetch was given up while it copied")
        part = slice(start, start + batch)
        sources, destinations = table.sources[part], table.destinations[part]
        try:
            if digests is None:
                storage.write_blocks(destinations, source, sources)
            else:
                valid = table.valid_tokens[part]
                digests.append(
                    as_bytes(storage.write_and_digest_blocks(destinations, source, sources, valid))
                )
        except (PdserveError, RuntimeError) as error:
            return Copied(f"the blocks could not be copied: {error}")
    return Copied(distrust(), None if digests is None else b"".join(digests))


def refusal(grant: Grant, *, sources: int | None, destinations: int | None, block_tokens: int) -> str | None:
    """Why a grant cannot be carried out between pools of these sizes (None: not this side's to check)."""
    if not (0 <= grant.epoch < _WORD and 0 <= grant.seq < _WORD):
        return f"epoch {grant.epoch} and seq {grant.seq} must be in [0, 2**63)"
    try:
        return grant.table.outside(sources=sources, destinations=destinations, block_tokens=block_tokens)
    except OverflowError:
        return "a segment has a number of 64 bits"
