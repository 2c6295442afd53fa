"""What was compiled from a source, found again by the source."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar
from weakref import WeakValueDictionary

Source = TypeVar("Source", bound=Hashable)
Result = TypeVar("Result")


class RecentlyCompiled(Generic[Source, Result]):
    """Compiled values: those used last, and all that somebody holds. Safe in any thread.

    Whoever compiles ahead and keeps the result can be sure that the engine's thread finds it here.
    """

    def __init__(self, compiler: Callable[[Source], Result], keep: int) -> None:
        """`compiler` is called without a lock, in the thread that asks; `keep` results stay unasked."""
        self._compiler = compiler
        self._keep = keep
        self._alive: WeakValueDictionary[Source, Result] = WeakValueDictionary()
        self._recent: OrderedDict[Source, Result] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, source: Source) -> Result:
        """Compiled now, unless it was. Raises what the compiler raises; an error is not remembered."""
        with self._lock:
            found = self._alive.get(source)
        if found is None:
            found = self._compiler(source)
        with self._lock:
            found = self._alive.setdefault(source, found)
            self._recent[source] = found
            self._recent.move_to_end(source)
            if len(self._recent) > self._keep:
                self._recent.popitem(last=False)
        return found
