"""What one sequence's parameters and tokens so far do to its logits."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from pdserve.core.types import SamplingParams

Ids = npt.NDArray[np.int64]

_BAN: Final = -100.0
"""A bias this low is a ban, whatever the logit."""
_NO_IDS: Final = np.empty(0, dtype=np.int64)


class Matcher(Protocol):
    """A grammar and how far the completion has come through it."""

    @property
    def is_complete(self) -> bool:
        """Nothing but an end can come."""

    def take(self, token: int) -> None:
        """Go on with a token that is no end."""

    def allowed(self) -> npt.NDArray[np.uint8]:
        """One bit per token, the lowest of a byte first."""


@dataclass(frozen=True, slots=True, eq=False)
class LogitEdits:
    """What is done to one row of logits. The arrays are views of the sequence's: valid for one step."""

    params: SamplingParams
    bias_ids: Ids
    biases: npt.NDArray[np.float64]
    """Added to the logits of `bias_ids`."""
    seen_ids: Ids
    """Tokens of the completion and, for a repetition penalty, of the prompt; each once."""
    counts: Ids
    """How often the completion has each of `seen_ids`."""
    banned: Ids
    """Tokens that cannot be sampled, unless nothing else could."""
    allowed: npt.NDArray[np.uint8] | None
    """Under a constraint: the tokens that may come, one bit each, the lowest bit of a byte first."""


class LogitRules:
    """State of one sequence, a function of its tokens: owned by it, kept through preemptions.

    A step costs what the completion adds, not the length of prompt or vocabulary.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt: Sequence[int],
        completion: Iterable[int],
        eos_ids: frozenset[int],
        matcher: Matcher | None = None,
    ) -> None:
        """`completion` are the tokens of an earlier life; `matcher`, if any, is at the start of the text.

        Raises InvalidRequest where the matcher does not take the completion.
        """
        self._params = params
        self._matcher = matcher
        self._ends = frozenset() if params.ignore_eos else eos_ids
        self._is_complete = False
        self._taken = 0
        biases = dict(params.logit_bias)
        shifts = {token: bias for token, bias in biases.items() if bias > _BAN}
        self._bias_ids = _ids(shifts)
        self._biases = np.fromiter(shifts.values(), dtype=np.float64, count=len(shifts))
        bans = {token for token, bias in biases.items() if bias <= _BAN}
        if matcher is not None and params.ignore_eos:
            bans |= eos_ids  # no end while the grammar can go on
        self._bans = _ids(sorted(bans))
        self._early_bans = _ids(sorted(bans | self._ends | set(params.stop_token_ids)))
        self._counts_tokens = _penalises(params)
        self._seen = _TokenCounts(prompt if params.repetition_penalty != 1.0 else ())
        for token in completion:
            self.take(token)

    @staticmethod
    def needed(params: SamplingParams) -> bool:
        """Whether these parameters ever change a logit."""
        return bool(
            params.logit_bias or params.min_tokens or params.constraint is not None or _penalises(params)
        )

    @property
    def is_complete(self) -> bool:
        """The constraint is satisfied and the text cannot go on."""
        return self._is_complete

    def take(self, token: int) -> None:
        """The completion goes on with `token`. Raises InvalidRequest where the constraint forbids it."""
        self._taken += 1
        if self._counts_tokens:
            self._seen.add(token)
        if self._matcher is None:
            return
        if token in self._ends:
            self._is_complete = True
        else:
            self._matcher.take(token)
            self._is_complete = self._matcher.is_complete

    def edits(self) -> LogitEdits | None:
        """For the next token; None where its logits stay as they are.

        Raises InvalidRequest where the constraint is too complex to go on.
        """
        banned = self._early_bans if self._taken < self._params.min_tokens else self._bans
        allowed = None if self._matcher is None else self._matcher.allowed()
        seen = self._seen.ids if self._counts_tokens else _NO_IDS
        if allowed is None and not (banned.size or seen.size or self._bias_ids.size):
            return None
        counts = self._seen.counts if self._counts_tokens else _NO_IDS
        return LogitEdits(self._params, self._bias_ids, self._biases, seen, counts, banned, allowed)


class _TokenCounts:
    """Distinct tokens and how often the completion has them; grows by doubling."""

    def __init__(self, prompt: Sequence[int]) -> None:
        distinct = np.unique(np.asarray(prompt, dtype=np.int64))
        self._size = distinct.size
        self._ids = np.zeros(max(64, 2 * self._size), dtype=np.int64)
        self._ids[: self._size] = distinct
        self._counts = np.zeros_like(self._ids)
        self._places = {token: place for place, token in enumerate(distinct.tolist())}

    @property
    def ids(self) -> Ids:
        return self._ids[: self._size]

    @property
    def counts(self) -> Ids:
        return self._counts[: self._size]

    def add(self, token: int) -> None:
        place = self._places.setdefault(token, self._size)
        if place == self._size:
            if self._size == self._ids.size:
                self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
                self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
            self._ids[place] = token
            self._size += 1
        self._counts[place] += 1


def _penalises(params: SamplingParams) -> bool:
    return (
        params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
    )


def _ids(tokens: Iterable[int]) -> Ids:
    return np.asarray(list(tokens), dtype=np.int64)
