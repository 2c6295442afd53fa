"""Ending background tasks."""

import asyncio
from typing import Any

_AGAIN_S = 0.2


async def end_task(task: "asyncio.Task[Any] | None") -> None:
    """Cancel a task and wait for its end; nothing for None or an ended one.

    Once is not enough: on Python 3.11 a cancel that meets `wait_for` in the moment of its result is lost, and
    a loop around it goes on for ever.
    """
    while task is not None and not task.done():
        task.cancel()
        await asyncio.wait({task}, timeout=_AGAIN_S)
