"""Constraints over one model's tokens: which tokens may come next."""

from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from pdserve.core.constraint_check import grammar_of, load_llguidance, parser_limits, refuse
from pdserve.core.errors import InvalidRequest
from pdserve.core.types import Constraint
from pdserve.workers.engine.recently_compiled import RecentlyCompiled

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_COMPILED: Final = 64
"""Constraints that stay compiled: choices of one request, and requests that repeat a schema, share them."""


class ConstraintMatcher:
    """How far one sequence's tokens have come through a grammar: state of the tokens alone."""

    def __init__(self, matcher: "LLMatcher", constraint: Constraint) -> None:
        """Takes `matcher` over."""
        self._matcher = matcher
        self._constraint = constraint

    @property
    def is_complete(self) -> bool:
        """Nothing but an end can come."""
        return self._matcher.is_stopped()

    def take(self, token: int) -> None:
        """Go on with a token. Raises InvalidRequest where the grammar does not allow it here."""
        if not self._matcher.consume_token(token):
            self._fail()

    def allowed(self) -> npt.NDArray[np.uint8]:
        """The tokens that may come next, one bit each, the lowest bit of a byte first.

        Ends of the sequence are among them exactly when the text so far satisfies the constraint.
        Raises InvalidRequest where finding out exceeds the limits on effort.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():
            self._fail()
        return bits

    def _fail(self) -> None:
        reason = (self._matcher.get_error().strip().splitlines() or ["unknown error"])[0]
        raise InvalidRequest(f"the {self._constraint.kind} constraint cannot go on: {reason[:500]}")


class CompiledConstraint:
    """A grammar over one model's tokens. Read-only: each sequence has a matcher of its own."""

    def __init__(self, start: "LLMatcher", constraint: Constraint) -> None:
        """Takes `start` over, a matcher at the start of the text."""
        self._start = start
        self._constraint = constraint

    def matcher(self) -> ConstraintMatcher:
        """At the start of the text. Takes microseconds; in the engine's thread only."""
        return ConstraintMatcher(self._start.deep_copy(), self._constraint)


class ConstraintCompiler:
    """Compiles constraints for one model, in any thread: a large one takes a tenth of a second."""

    def __init__(self, tokenizer_json: str, vocab_size: int, eos_ids: frozenset[int]) -> None:
        """`tokenizer_json` is a `tokenizers` file; `vocab_size` is the width of the logits.

        Takes 10 µs per token of the vocabulary. What is wrong is said when a constraint comes.
        """
        self._compiled = RecentlyCompiled(self._compile, _COMPILED)
        self._refusal: InvalidRequest | None = None
        self._tokenizer: LLTokenizer | None = None
        try:
            self._tokenizer = _make_tokenizer(tokenizer_json, vocab_size, eos_ids)
        except InvalidRequest as error:
            self._refusal = error
        except ValueError as error:
            self._refusal = InvalidRequest(f"this model's tokenizer cannot be constrained: {error}")

    def compiled(self, constraint: Constraint) -> CompiledConstraint:
        """Raises InvalidRequest where `constraint` cannot be compiled."""
        if self._refusal is not None:
            raise InvalidRequest(self._refusal.message)
        return self._compiled.get(constraint)

    def matcher(self, constraint: Constraint) -> ConstraintMatcher:
        """At the start of the text: at once where it was compiled ahead. Raises as `compiled` does."""
        return self.compiled(constraint).matcher()

    def _compile(self, constraint: Constraint) -> CompiledConstraint:
        matcher: LLMatcher = load_llguidance().LLMatcher(
            self._tokenizer, grammar_of(constraint), log_level=0, limits=parser_limits()
        )
        if matcher.is_error():
            refuse(constraint, matcher.get_error())
        return CompiledConstraint(matcher, constraint)


def _make_tokenizer(tokenizer_json: str, vocab_size: int, eos_ids: frozenset[int]) -> "LLTokenizer":
    """Raises InvalidRequest without llguidance, ValueError for a tokenizer that it does not know."""
    import tokenizers

    backend = tokenizers.Tokenizer.from_str(tokenizer_json)
    known = 1 + max(backend.get_vocab(with_added_tokens=True).values(), default=-1)
    ends = sorted(token for token in eos_ids if token < known)
    tokenizer: LLTokenizer = load_llguidance().LLTokenizer(
        tokenizer_json, n_vocab=max(vocab_size, known), eos_token=ends or None
    )
    return tokenizer
