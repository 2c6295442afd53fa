"""One request of a fault case: how it ended, and whether it may end so."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from fault_cases import COMPLETION_TOKENS, DEADLINE_S, NAMES, STRIKES_AT_TOKEN, Case, End, Kind
from fault_table import Row
from greedy_reference import GreedyReference

from pdserve.client import AsyncClient, Result, RetryPolicy, StreamLost
from pdserve.core.errors import PdserveError


@dataclass(frozen=True, slots=True)
class Ended:
    """How one request ended."""

    end: End
    seconds: float
    tokens: tuple[int, ...]
    told: str
    result: Result | None = None
    error: PdserveError | None = None


async def ask_for(target: str, prompt: Sequence[int]) -> Ended:
    """Send one greedy request to a router and wait for its end, whichever it is."""
    began = time.monotonic()
    once = RetryPolicy(attempts=1)  # what the cluster says itself, not what a second call makes of it
    async with AsyncClient(target, timeout=DEADLINE_S, retry=once) as client:
        try:
            result = await client.generate(
                token_ids=list(prompt), max_tokens=COMPLETION_TOKENS, temperature=0.0, ignore_eos=True
            )
        except PdserveError as error:
            seconds = time.monotonic() - began
            tokens = error.partial.token_ids if isinstance(error, StreamLost) else ()
            told = f"{type(error).__name__}, retriable: {error.retriable}, after {len(tokens)} tokens"
            return Ended(End.RETRIABLE, seconds, tokens, told, error=error)
    route = result.route
    way = f"over {route.transport}" if route.transport else "by itself"
    told = f"all tokens, prefilled by {route.prefill_worker} {way}"
    return Ended(End.TOKENS, time.monotonic() - began, result.token_ids, told, result=result)


def judge(
    reference: GreedyReference, case: Case, prompt: Sequence[int], ended: Ended, bound_s: float
) -> None:
    """Raise AssertionError where a struck request did not end as it must: rightly, in time, told clearly."""
    assert ended.end in case.ends, f"it ended with {ended.told}: {ended.error}"
    assert ended.seconds <= bound_s, f"it took {ended.seconds:.1f} s, the bound is {bound_s:.1f} s"
    assert (wrong := reference.first_wrong(prompt, ended.tokens)) is None, f"token {wrong} is wrong"
    if ended.result is not None:
        assert len(ended.tokens) == COMPLETION_TOKENS
        route = ended.result.route
        if case.victim == "P" or case.kind is Kind.CORRUPT:
            by, tried = (NAMES["P"], 0) if case.committed else (NAMES["D"], 1)
            assert (route.prefill_worker, route.candidates_tried) == (by, tried), route
        return
    assert ended.error is not None
    assert ended.error.retriable, ended.error
    if case.kind is Kind.SIGKILL:  # what was sampled before had been sent
        assert len(ended.tokens) == (STRIKES_AT_TOKEN - 1 if case.committed else 0)


def judge_calm(
    reference: GreedyReference, prompt: Sequence[int], ended: Ended, transport: str, why: str
) -> None:
    """Raise AssertionError unless a request that nothing struck ended right, and as a handoff."""
    assert ended.result is not None, f"{why}: {ended.told}: {ended.error}"
    assert len(ended.tokens) == COMPLETION_TOKENS
    assert reference.first_wrong(prompt, ended.tokens) is None, f"{why}: wrong tokens"
    route = ended.result.route
    assert (route.prefill_worker, route.transport) == (NAMES["P"], transport), f"{why}: {route}"


def row(transport: str, case: Case, ended: Ended, bound_s: float, rate: str = "") -> Row:
    """What the table says of a case for which everything held, the workers' books included."""
    return Row(
        transport=transport,
        fault=str(case.kind),
        victim=case.victim,
        state=case.state,
        what=case.what or rate,
        ended=ended.told,
        seconds=ended.seconds,
        bound_s=bound_s,
        integrity="ok",
    )
