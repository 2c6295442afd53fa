"""When to try the way that looks worse, so that a wrong model is found out: a budget, not a dice.

A way that is never taken is never measured, and a prediction that was once wrong would stay. So every second
that the chosen way took earns the other one a small credit in seconds; a decision may go the other way where
its credit covers what that seems to cost, and then the credit is gone. So exploring costs a bounded share of
all time, however wrong the model is or however bad the other way, and cheap requests try first.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Final

_SHARE: Final = 0.01
"""Of the time that requests take one way, what may be spent on trying the other."""

_MOST_CREDIT_S: Final = 10.0
"""No single request pays more than this for what others learn."""


class PrefillPath(StrEnum):
    """Where a prompt is computed, in view of the worker that owns the request."""

    LOCAL = "local"
    """In the owner's own pool."""
    HANDOFF = "handoff"
    """At a prefill worker."""


class Exploration:
    """The credits of one decode worker. Pure."""

    def __init__(self, values: Mapping[str, float] | None = None) -> None:
        """`values`: an earlier `snapshot`, perhaps among other things."""
        found = values or {}
        self._credit = {path: min(_MOST_CREDIT_S, found.get(_key(path), 0.0)) for path in PrefillPath}

    def took(self, path: PrefillPath, seconds: float) -> None:
        """A request took `path` and `seconds` to its first token."""
        for other in PrefillPath:
            earned = min(_MOST_CREDIT_S, self._credit[other] + _SHARE * seconds)
            self._credit[other] = 0.0 if other is path else earned

    def credit_s(self, path: PrefillPath) -> float:
        """What one decision may lose by taking `path`, in seconds."""
        return self._credit[path]

    def snapshot(self) -> dict[str, float]:
        return {_key(path): credit for path, credit in self._credit.items()}


def _key(path: PrefillPath) -> str:
    return f"exploration/{path}/credit_seconds"
