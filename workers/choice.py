"""One of a request's completions, as D owns it."""

from dataclasses import dataclass

from pdserve.core.types import OwnerId


@dataclass(slots=True)
class Choice:
    """How far one choice has come. Its sequence is the engine's business."""

    index: int
    emitted: int = 0
    """Tokens that were passed on."""
    finished: bool = False


@dataclass(frozen=True, slots=True)
class ChoiceStart:
    """What a choice's sequence begins with: a table, and the positions whose KV lies in it."""

    owner: OwnerId
    num_computed: int
