"""Which prompts P may fill: those waiting to be fetched share a bounded part of its pool."""

from collections import OrderedDict
from collections.abc import Callable

from pdserve.core.errors import InternalError
from pdserve.core.types import HandoffId


class ExportQueue:
    """First come, first served. Lends `capacity` blocks; whoever enters leaves exactly once."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._lent: dict[HandoffId, int] = {}
        self._waiting: OrderedDict[HandoffId, tuple[int, Callable[[], None]]] = OrderedDict()

    def __len__(self) -> int:
        """How many wait."""
        return len(self._waiting)

    @property
    def lent(self) -> int:
        """Blocks that are lent now."""
        return sum(self._lent.values())

    def enter(self, handoff: HandoffId, blocks: int, admit: Callable[[], None]) -> None:
        """Call `admit` once `blocks` can be lent, perhaps before this returns."""
        self._waiting[handoff] = (blocks, admit)
        self._admit()

    def enter_now(self, handoff: HandoffId, blocks: int) -> bool:
        """Lend `blocks` at once, overtaking nobody; False, and nothing is lent, where they have to wait."""
        if self._waiting or self.lent + blocks > self.capacity:
            return False
        self._lent[handoff] = blocks
        return True

    def leave(self, handoff: HandoffId) -> None:
        """Give back what was lent, or stop waiting. Idempotent."""
        self._waiting.pop(handoff, None)
        self._lent.pop(handoff, None)
        self._admit()

    def check_integrity(self) -> None:
        """Raise InternalError where more is lent than there is."""
        if self.lent > self.capacity:
            raise InternalError(f"{self.lent} blocks are lent to handoffs, the limit is {self.capacity}")

    def _admit(self) -> None:
        while self._waiting:
            handoff, (blocks, admit) = next(iter(self._waiting.items()))
            if self.lent + blocks > self.capacity:
                return
            del self._waiting[handoff]
            self._lent[handoff] = blocks
            admit()
