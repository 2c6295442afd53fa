"""How long a handoff may stay in each of its states. Pure: the caller brings times and predictions.

D leaves a state at the earlier of two moments:

- it has waited as long as what it waits for was predicted to take, or as long as beginning anew elsewhere
  would take, whichever is longer, and `silence_s` more. Who waits that long and then leaves has lost at most
  about twice what knowing the outcome beforehand would have saved;
- the last call: then just so much of the request's time is left as prefilling elsewhere takes. Only a peer
  that is within its own prediction, where that prediction fits into the deadline, may go on behind it.

Where nobody else could be asked, giving up early helps nobody: the deadline is the bound of every state. So
it is for memory of D's own, which every candidate's KV needs. States that were given up already have none:
what a transport may still write is in quarantine for as long as it may.
"""

import math
from dataclasses import dataclass

from pdserve.core.perfmodel import Prediction
from pdserve.kvtransfer.handoff import events as ev
from pdserve.kvtransfer.handoff.decode_side import DecodeHandoff
from pdserve.kvtransfer.handoff.prefill_side import PrefillHandoff
from pdserve.kvtransfer.handoff.states import DecodeState, PrefillState

_CAUTION = 2.0
"""Predictions count as wrong by so many times their mean error."""

_UNKNOWN_ERROR = 1.0
"""What a prediction that nobody has compared with anything counts as too short by."""

AT_ONCE = Prediction(0.0, 0.0)
"""What a peer that gets on answers from its event loop."""


def slow(prediction: Prediction) -> float:
    """Seconds that it may well take. Infinite for what is no number: estimates come off the wire."""
    error = _UNKNOWN_ERROR if prediction.relative_error is None else prediction.relative_error
    seconds = prediction.seconds * (1.0 + _CAUTION * error)
    return max(0.0, seconds) if math.isfinite(seconds) else math.inf


def quick(prediction: Prediction) -> float:
    """Seconds that it takes at least; 0 where nobody has compared it, and for what is no number."""
    if prediction.relative_error is None:
        return 0.0
    seconds = prediction.seconds / (1.0 + _CAUTION * prediction.relative_error)
    return max(0.0, seconds) if math.isfinite(seconds) else 0.0


@dataclass(frozen=True, slots=True)
class Budget:
    """What a request's time allows one attempt. Readings of one clock, in seconds."""

    began_at: float
    deadline: float
    silence_s: float
    """How long a peer may be later than predicted."""
    further: int = 0
    """Candidates that could still be asked behind this one."""

    def last_call(self, elsewhere_s: float) -> float:
        """When the attempt has to end so that another can begin.

        The others' equal share of the time is the most that is kept for them.
        """
        if not self.further:
            return self.deadline
        share = (self.deadline - self.began_at) * self.further / (self.further + 1)
        return self.deadline - min(elsewhere_s, share)


@dataclass(frozen=True, slots=True)
class Outlook:
    """What D expects, in seconds."""

    fill: Prediction
    """P's rest of the fill, its queue included, from the last news of it."""
    transfer: Prediction
    """All bytes that D does not hold."""
    elsewhere: Prediction | None
    """Prefilling anew; None where nothing is known of it."""


@dataclass(frozen=True, slots=True)
class StateBound:
    """The latest moment in a state, and how to say that it came."""

    since: float
    at: float
    waited_for: str
    because: str
    final: bool
    """The request's own deadline, rather than one that leaves time for another attempt."""

    def passed(self, state: str, now: float) -> ev.DeadlinePassed | ev.StateExpired:
        """The event, told with state, bound and what was waited for."""
        said = (
            f"{now - self.since:.2f} s for {self.waited_for}, at most {max(0.0, self.at - self.since):.2f} s "
            f"in state {state}: {self.because}"
        )
        return ev.DeadlinePassed(said) if self.final else ev.StateExpired(said)


def decode_bound(machine: DecodeHandoff, since: float, budget: Budget, outlook: Outlook) -> StateBound:
    """D's bound for its present state. `since`: when it came there, or the last news of what it waits for."""
    if machine.wants_memory:
        # Memory that comes later is too late for the copies.
        at = budget.deadline - quick(outlook.transfer)
        return StateBound(since, at, "blocks of D's own pool", "the request's deadline", True)
    waited_for, expected, behind = _awaited(machine, outlook)
    return _bound(since, waited_for, expected, behind, budget, outlook.elsewhere)


def prefill_bound(machine: PrefillHandoff, since: float, deadline: float, fill: Prediction) -> StateBound:
    """P's bound: a fill that cannot end before the deadline is not begun. `fill`: of the whole prompt."""
    if machine.state is PrefillState.OPEN:
        because = f"the fill takes {quick(fill):.2f} s at least, and D waits no longer"
        return StateBound(since, deadline - quick(fill), "a share of P's pool", because, False)
    waited_for = "the engine" if machine.state is PrefillState.FILLING else "D to fetch and release"
    return StateBound(since, deadline, waited_for, "D waits no longer", True)


def _awaited(machine: DecodeHandoff, outlook: Outlook) -> tuple[str, Prediction, float]:
    """What D waits for, how long that was predicted to take, and seconds for what comes behind it."""
    transfer_s = slow(outlook.transfer)
    match machine.state:
        case DecodeState.OPEN if not machine.opened:
            return "P's answer to Open", AT_ONCE, math.inf
        case DecodeState.OPEN:
            return "P's first chunk", outlook.fill, transfer_s
        case DecodeState.RESERVED:
            return "a way to P's memory", AT_ONCE, transfer_s
        case DecodeState.FETCHING if not machine.filled:
            return "P's next chunk", outlook.fill, transfer_s
        case DecodeState.FETCHING:
            return "the transfer's end", outlook.transfer, 0.0
    return "P's Released", AT_ONCE, 0.0


def _bound(
    since: float,
    waited_for: str,
    expected: Prediction,
    behind_s: float,
    budget: Budget,
    elsewhere: Prediction | None,
) -> StateBound:
    if not budget.further:
        return StateBound(since, budget.deadline, waited_for, "the request's deadline", True)
    elsewhere_s = math.inf if elsewhere is None else slow(elsewhere)
    last_call = budget.last_call(elsewhere_s)
    because = f"{budget.deadline - last_call:.2f} s are kept to prefill elsewhere"
    by = since + slow(expected)
    if last_call < by and by + behind_s <= budget.deadline:
        last_call, because = by, "it was predicted to be there by now"
    if expected is AT_ONCE:
        patience_s = budget.silence_s
    else:
        kept_s = 0.0 if math.isinf(elsewhere_s) else elsewhere_s
        patience_s = max(slow(expected), kept_s) + budget.silence_s
    if since + patience_s < last_call:
        late = f"{slow(expected):.2f} s were predicted"
        return StateBound(since, since + patience_s, waited_for, late, False)
    return StateBound(since, last_call, waited_for, because, False)
