"""What an engine knows of its model beyond the runner, and what each sequence gets of it."""

from collections.abc import Callable
from dataclasses import dataclass

from pdserve.core.errors import InvalidRequest
from pdserve.core.text.stop_matcher import StopAutomaton
from pdserve.core.types import Constraint
from pdserve.workers.engine.emission import Detokenizer, Emitter
from pdserve.workers.engine.logit_rules import LogitRules, Matcher
from pdserve.workers.engine.messages import SequenceSpec


@dataclass(frozen=True, slots=True)
class EngineModel:
    """Limits and makers. The makers run in the engine's thread: what takes long is compiled ahead."""

    max_positions: int
    """Longest context, in tokens."""
    eos_ids: frozenset[int]
    detokenizers: Callable[[], Detokenizer]
    """Makes a fresh one for each sequence that samples."""
    constraints: Callable[[Constraint], Matcher] | None = None
    """Compiles a constraint, or raises InvalidRequest; None: this engine takes none."""
    stops: Callable[[tuple[str, ...]], StopAutomaton] = StopAutomaton
    """Compiles stop strings."""

    def emitter(self, spec: SequenceSpec) -> Emitter | None:
        """With the text of the prior tokens behind it; None where nothing is sampled.

        Raises InvalidRequest for an empty stop string, or a prior token out of the vocabulary.
        """
        params = spec.sampling
        if params is None:
            return None
        emitter = Emitter(self.detokenizers(), self.stops(params.stop) if params.stop else None)
        for token in spec.token_ids[len(spec.token_ids) - spec.prior_tokens :]:
            emitter.replay(token)
        return emitter

    def rules(self, spec: SequenceSpec) -> LogitRules | None:
        """With the prior tokens taken; None where no logit is ever changed.

        Raises InvalidRequest for a constraint that does not compile, or that prior tokens break.
        """
        params = spec.sampling
        if params is None or not LogitRules.needed(params):
            return None
        matcher = None
        if params.constraint is not None:
            if self.constraints is None:
                raise InvalidRequest("this model takes no constraints on its output: leave it out")
            matcher = self.constraints(params.constraint)
        prompt = len(spec.token_ids) - spec.prior_tokens
        return LogitRules(params, spec.token_ids[:prompt], spec.token_ids[prompt:], self.eos_ids, matcher)
