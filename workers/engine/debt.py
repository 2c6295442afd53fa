"""What a sequence that had to yield is owed."""

from dataclasses import dataclass

from pdserve.core.request_limits import promise_blocks
from pdserve.core.types import OwnerId


@dataclass(frozen=True, slots=True)
class Debt:
    """The promise of a request, and what it grows to when one of its choices yields its blocks.

    A preempted sequence has its blocks before newcomers are promised any, also where it outgrew its promise:
    what it needs now, and headroom for the rest. Its sister choices are taken to be as long.
    """

    owner: OwnerId
    """Who the promise is booked on. It is not given back while the sequence lives."""
    prompt_tokens: int
    max_tokens: int
    headroom_tokens: int
    choices: int

    def blocks(self, completion_tokens: int) -> int:
        """Of the whole request, whose choices have `completion_tokens` each."""
        headroom = completion_tokens + self.headroom_tokens
        return promise_blocks(self.prompt_tokens, self.max_tokens, headroom, self.choices)
