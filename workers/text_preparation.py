"""Stop strings and constraints, compiled before a request's sequences start.

In a thread: in the engine's a large one would hold up the whole batch, and on the event loop all streams.
"""

import asyncio
from collections.abc import Callable
from typing import Final

from pdserve.core.text.stop_matcher import StopAutomaton
from pdserve.core.types import Constraint, SamplingParams
from pdserve.workers.engine.recently_compiled import RecentlyCompiled

_STOP_SETS: Final = 64
"""Sets of stop strings that stay compiled while no request uses them."""


class TextPreparation:
    """Of one worker. Its engine finds what was prepared, as long as somebody holds that."""

    def __init__(self, compile_constraint: Callable[[Constraint], object]) -> None:
        """`compile_constraint` remembers; it is called in threads."""
        self._compile_constraint = compile_constraint
        self._stops = RecentlyCompiled[tuple[str, ...], StopAutomaton](StopAutomaton, _STOP_SETS)
        self._turn = asyncio.Lock()

    def stops(self, stops: tuple[str, ...]) -> StopAutomaton:
        """Compiled now, unless it was. In any thread."""
        return self._stops.get(stops)

    async def prepare(self, params: SamplingParams) -> object:
        """Hold the result until the engine has the sequences. Raises InvalidRequest for what is wrong.

        One at a time, so that hostile requests cannot take all threads.
        """
        if params.constraint is None and not params.stop:
            return None
        async with self._turn:
            return await asyncio.to_thread(self._compile, params)

    def _compile(self, params: SamplingParams) -> tuple[object, ...]:
        stops = self.stops(params.stop) if params.stop else None
        return stops, None if params.constraint is None else self._compile_constraint(params.constraint)
