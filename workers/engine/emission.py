"""From sampled tokens to what a sequence says: nothing of which a stop string could still take a part."""

from collections import deque
from dataclasses import dataclass
from typing import Protocol

from pdserve.core.text.stop_matcher import StopAutomaton, StopMatcher
from pdserve.core.types import FinishReason, TokenLogprobs


class Detokenizer(Protocol):
    """Token ids to text, one at a time; owned by one sequence."""

    def push(self, token_id: int) -> str:
        """The text that became certain with this token; may be empty."""

    def finish(self) -> str:
        """What was held back."""


@dataclass(frozen=True, slots=True)
class Emission:
    """What one sampled token made certain: none, one or several tokens with exactly their text.

    Only the last one of a sequence may have less text than its tokens: what a stop cut off.
    """

    token_ids: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[TokenLogprobs, ...] = ()
    """One per token where they were given."""
    finish_reason: FinishReason | None = None


@dataclass(frozen=True, slots=True)
class _Held:
    token: int
    text: str
    """What became certain of the text with this token."""
    logprobs: TokenLogprobs | None


class Emitter:
    """Holds tokens back, with their text and logprobs, while a stop string may begin in the text.

    Owned by one sequence. Its state is a function of the tokens alone, so a resume replays them.
    """

    def __init__(self, detokenizer: Detokenizer, stops: StopAutomaton | None = None) -> None:
        """`detokenizer` is a fresh one, taken over; `stops` may be shared."""
        self._detokenizer = detokenizer
        self._matcher = None if stops is None else StopMatcher(stops)
        self._held: deque[_Held] = deque()
        self._emitted_chars = 0

    def replay(self, token: int) -> None:
        """Take a token that was emitted in an earlier life: nothing of it can be held back any more."""
        text = self._detokenizer.push(token)
        self._emitted_chars += len(text)
        if self._matcher is not None:
            self._matcher.push(text, armed=False)

    def push(
        self,
        token: int,
        logprobs: TokenLogprobs | None,
        reason: FinishReason | None,
        *,
        armed: bool,
        silent: bool,
    ) -> Emission:
        """Take a sampled token; with a `reason` it is the last one, unless a stop says so first.

        A `silent` token has no text. Stops that end while not `armed` are text like any other.
        """
        text = "" if silent else self._detokenizer.push(token)
        if reason is not None:
            text += self._detokenizer.finish()
        self._held.append(_Held(token, text, logprobs))
        if self._matcher is not None:
            cut = self._matcher.push(text, armed=armed)
            if cut is not None:
                return self._emit(len(self._held), FinishReason.STOP, cut)
            if reason is None:
                return self._emit(self._certain_tokens(self._matcher.certain), None)
        return self._emit(len(self._held), reason)

    def _certain_tokens(self, certain_chars: int) -> int:
        """How many of the held tokens have all of their text before that position."""
        end = self._emitted_chars
        for number, held in enumerate(self._held):
            end += len(held.text)
            if end > certain_chars:
                return number
        return len(self._held)

    def _emit(self, count: int, reason: FinishReason | None, cut: int | None = None) -> Emission:
        """The first `count` tokens; their text up to the position `cut`."""
        said = [self._held.popleft() for _ in range(count)]
        text = "".join(held.text for held in said)
        if cut is not None:
            text = text[: max(0, cut - self._emitted_chars)]
        self._emitted_chars += len(text)
        logprobs = tuple(held.logprobs for held in said if held.logprobs is not None)
        return Emission(tuple(held.token for held in said), text, logprobs, reason)
