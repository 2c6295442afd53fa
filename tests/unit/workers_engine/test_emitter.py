"""What a sequence says: the single-shot text, cut, in whole tokens, and never a part of a stop."""

from collections.abc import Sequence as Items

import pytest
from engine_harness import ROOT
from hypothesis import given
from hypothesis import strategies as st

from pdserve.core.text.stop_matcher import StopAutomaton
from pdserve.core.types import FinishReason, OwnerId, SamplingParams, SequenceId, TokenLogprobs
from pdserve.workers.engine.emission import Emission, Emitter
from pdserve.workers.engine.messages import SequenceSpec
from pdserve.workers.engine.sequence import Sequence

EOS = 99
PIECES = ["a", "b", "c", "ab", "ca", "bcab", "", "\N{GREEK SMALL LETTER ALPHA}"]
HALF = 50
"""Half a character: what follows makes it whole; alone at the end it is a replacement character."""


class PieceDetokenizer:
    """Token t is PIECES[t]; the text of HALF comes with the next token, or at the end."""

    def __init__(self) -> None:
        self._half = False

    def push(self, token_id: int) -> str:
        if token_id == HALF:
            whole, self._half = ("\N{REPLACEMENT CHARACTER}" if self._half else ""), True
            return whole
        before = "\N{REPLACEMENT CHARACTER}" if self._half else ""
        self._half = False
        return before + (PIECES[token_id] if token_id < len(PIECES) else "")

    def finish(self) -> str:
        text, self._half = ("\N{REPLACEMENT CHARACTER}" if self._half else ""), False
        return text


def decoded(tokens: Items[int]) -> str:
    detokenizer = PieceDetokenizer()
    return "".join(map(detokenizer.push, tokens)) + detokenizer.finish()


def sequence(prior: Items[int] = (), **sampling: object) -> Sequence:
    params = SamplingParams(**{"max_tokens": 50, **sampling})  # type: ignore[arg-type]
    tokens = (1, *prior)
    spec = SequenceSpec(SequenceId("s"), OwnerId("s"), tokens, (), ROOT, params, prior_tokens=len(prior))
    emitter = Emitter(PieceDetokenizer(), StopAutomaton(params.stop) if params.stop else None)
    for token in prior:
        emitter.replay(token)
    return Sequence(spec, 0, emitter)


def logprobs_of(token: int, index: int) -> TokenLogprobs:
    return TokenLogprobs(token, -float(index), 1, ())


def run(over: Sequence, tokens: Items[int]) -> list[Emission]:
    """Until it ends; every message is checked against those before it."""
    said: list[Emission] = []
    for index, token in enumerate(tokens):
        emission = over.append(token, logprobs_of(token, index), frozenset({EOS}))
        first = over.output(emission).first_index
        assert first == over.spec.prior_tokens + sum(len(before.token_ids) for before in said)
        assert [entry.token_id for entry in emission.logprobs] == list(emission.token_ids)
        said.append(emission)
        if emission.finish_reason is not None:
            break
    return said


def text_of(said: Items[Emission]) -> str:
    return "".join(emission.text for emission in said)


def ids_of(said: Items[Emission]) -> list[int]:
    return [token for emission in said for token in emission.token_ids]


tokens_strategy = st.lists(st.sampled_from([*range(len(PIECES)), HALF]), min_size=1, max_size=20)
stops_strategy = st.lists(
    st.text(alphabet="abc\N{GREEK SMALL LETTER ALPHA}\N{REPLACEMENT CHARACTER}", min_size=1, max_size=4),
    max_size=4,
)


def first_stop(text: str, stops: Items[str]) -> tuple[int, int] | None:
    """(where it begins, where it ends): ends first, then the longest."""
    for end in range(1, len(text) + 1):
        sizes = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if sizes:
            return end - max(sizes), end
    return None


@given(tokens=tokens_strategy, stops=stops_strategy, last=st.sampled_from(["eos", "length", "stop id"]))
def test_the_chunks_are_the_single_shot_text_cut_before_the_first_stop(
    tokens: list[int], stops: list[str], last: str
) -> None:
    limit = len(tokens) if last == "length" else 50
    over = sequence(stop=tuple(stops), stop_token_ids=(98,), max_tokens=limit)
    ended = tokens if last == "length" else [*tokens, EOS if last == "eos" else 98]
    said = run(over, ended)
    whole = decoded(tokens)
    found = first_stop(whole, stops)
    assert text_of(said) == (whole if found is None else whole[: found[0]])
    assert said[-1].finish_reason is (
        FinishReason.LENGTH if last == "length" and not found else FinishReason.STOP
    )
    ran = ended[: len(said)]
    assert ids_of(said) == ran, "token_ids ends with the token that completed the stop"
    if found is None:
        assert ran == ended
    for count in range(1, len(said)):  # nothing is said that a later token takes back
        seen = text_of(said[:count])
        assert not any(stop in seen for stop in stops)
        assert whole.startswith(seen)
        assert found is None or len(seen) <= found[0]


@given(tokens=tokens_strategy, stops=stops_strategy)
def test_a_message_has_exactly_the_text_of_its_tokens(tokens: list[int], stops: list[str]) -> None:
    over = sequence(stop=tuple(stops))
    for count in range(1, len(tokens) + 1):
        emission = over.append(tokens[count - 1], None, frozenset())
        if emission.finish_reason is not None:
            return
        emitted = over.output().first_index
        detokenizer = PieceDetokenizer()
        pieces = [detokenizer.push(token) for token in tokens[:count]]
        assert emission.text == "".join(pieces[emitted - len(emission.token_ids) : emitted])


@given(tokens=tokens_strategy, stops=stops_strategy, data=st.data())
def test_a_resume_says_what_the_undisturbed_sequence_says_next(
    tokens: list[int], stops: list[str], data: st.DataObject
) -> None:
    """What was emitted is given as prior tokens; what was held back is sampled again."""
    ended = [*tokens, EOS]
    whole = run(sequence(stop=tuple(stops)), ended)
    cut = data.draw(st.integers(0, len(whole) - 1))
    prior = ids_of(whole[:cut])
    resumed = run(sequence(prior, stop=tuple(stops)), ended[len(prior) :])
    assert text_of(whole[:cut]) + text_of(resumed) == text_of(whole)
    assert prior + ids_of(resumed) == ids_of(whole)
    assert resumed[-1].finish_reason is whole[-1].finish_reason


@given(tokens=tokens_strategy, stops=stops_strategy, least=st.integers(0, 20))
def test_nothing_stops_a_sequence_before_its_min_tokens(
    tokens: list[int], stops: list[str], least: int
) -> None:
    said = run(sequence(stop=tuple(stops), stop_token_ids=(2,), min_tokens=least), [*tokens, EOS])
    ran = ids_of(said)
    if said[-1].finish_reason is not None:
        assert len(ran) >= least
    if len(tokens) + 1 < least:
        assert said[-1].finish_reason is None


@pytest.mark.parametrize("reason", ["eos", "stop id"])
def test_the_token_that_ends_is_told_without_its_text(reason: str) -> None:
    token = EOS if reason == "eos" else 0
    said = run(sequence(stop_token_ids=(0,)), [1, token, 2])
    assert (ids_of(said), text_of(said), said[-1].finish_reason) == ([1, token], "b", FinishReason.STOP)


def test_a_stop_token_that_is_the_end_of_text_stops_also_where_that_is_ignored() -> None:
    said = run(sequence(ignore_eos=True, stop_token_ids=(EOS,)), [1, EOS])
    assert said[-1].finish_reason is FinishReason.STOP
    assert run(sequence(ignore_eos=True), [1, EOS])[-1].finish_reason is None


def test_what_may_begin_a_stop_is_held_back_and_said_when_it_did_not() -> None:
    said = run(sequence(stop=("abx",)), [2, 0, 1, 2, 0, EOS])  # c a b c a <end>
    assert [(e.token_ids, e.text) for e in said] == [
        ((2,), "c"),
        ((), ""),
        ((), ""),
        ((0, 1, 2), "abc"),
        ((), ""),
        ((0, EOS), "a"),
    ]
