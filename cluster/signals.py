"""How a cluster in this process ends: by its own end, or by a signal that Ray must not take away."""

import asyncio
import logging
import os
import signal
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

log = logging.getLogger(__name__)

ENDING = (signal.SIGINT, signal.SIGTERM)

T = TypeVar("T")


def run_until_signal(main: Coroutine[Any, Any, T], abandon: Callable[[], None]) -> T | None:
    """Run `main` on a new event loop; returns its result, None when SIGINT or SIGTERM cancelled it.

    A second signal calls `abandon` and ends this process at once, with the status that shells give.
    """
    return asyncio.run(_until_signal(main, abandon))


def take_signals_back() -> None:
    """Undo what Ray's start does to the signals that end a process; nothing outside of the main thread.

    Ray's C++ side puts its crash handler, which prints a stack and aborts, over SIGTERM. Python still knows
    the handler that it had; setting it again puts Python's own back in place.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    for number in ENDING:
        handler = signal.getsignal(number)
        if handler is not None:
            signal.signal(number, handler)
            signal.siginterrupt(number, False)  # as asyncio has it


async def _until_signal(main: Coroutine[Any, Any, T], abandon: Callable[[], None]) -> T | None:
    loop = asyncio.get_running_loop()
    task = asyncio.create_task(main)
    asked = False

    def on_signal(number: int) -> None:
        nonlocal asked
        if asked:
            abandon()
            os._exit(128 + number)
        asked = True
        log.info("%s: ending; once more ends it at once", signal.Signals(number).name)
        task.cancel()

    for number in ENDING:
        loop.add_signal_handler(number, on_signal, number)
    try:
        return await task
    except asyncio.CancelledError:
        if not asked:
            raise
        return None
