"""Which constraints compile: said at the door, remembered, and never in the way of other requests."""

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from pdserve.core.errors import InvalidRequest
from pdserve.core.types import Constraint

REMEMBERED: Final = 1024


class ConstraintChecks:
    """Verdicts on the constraints seen last. Runs on one event loop.

    They compile in a thread, for a short one may cost as much as a long one, and one at a time, so that
    hostile ones cannot take all threads.
    """

    def __init__(self, compiles: Callable[[Constraint], None]) -> None:
        """`compiles` raises InvalidRequest for what it cannot compile; it is called in threads."""
        self._compiles = compiles
        self._verdicts: OrderedDict[bytes, str | None] = OrderedDict()
        """Digest to what is wrong, None for nothing; the oldest first."""
        self._turn = asyncio.Lock()

    def __len__(self) -> int:
        return len(self._verdicts)

    async def check(self, constraint: Constraint) -> None:
        """Raises InvalidRequest in the compiler's words."""
        key = _digest(constraint)
        if key not in self._verdicts:
            async with self._turn:
                if key not in self._verdicts:  # not found out by another while this one waited
                    self._remember(key, await asyncio.to_thread(self._compile, constraint))
        self._verdicts.move_to_end(key)
        wrong = self._verdicts[key]
        if wrong is not None:
            raise InvalidRequest(wrong)

    def _compile(self, constraint: Constraint) -> str | None:
        try:
            self._compiles(constraint)
        except InvalidRequest as error:
            return error.message
        return None

    def _remember(self, key: bytes, verdict: str | None) -> None:
        self._verdicts[key] = verdict
        while len(self._verdicts) > REMEMBERED:
            self._verdicts.popitem(last=False)


def _digest(constraint: Constraint) -> bytes:
    """16 bytes: keeping the sources would keep up to 64 KiB each."""
    text = f"{constraint.kind}\0{constraint.source}"
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).digest()
