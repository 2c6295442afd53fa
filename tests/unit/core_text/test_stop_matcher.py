"""The automaton agrees with a search that tries every stop at every character."""

import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.core.errors import InvalidRequest
from pdserve.core.text.stop_matcher import StopAutomaton, StopMatcher

letters = st.text(alphabet="abc", max_size=30)
stop_sets = st.lists(st.text(alphabet="abc", min_size=1, max_size=5), max_size=6)


def naive_cut(text: str, stops: list[str]) -> int | None:
    """Where the stop begins that ends first, of those that end together the longest."""
    for end in range(1, len(text) + 1):
        ending = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if ending:
            return end - max(ending)
    return None


def naive_certain(text: str, stops: list[str]) -> int:
    """How much of a text without a stop is before everything that may begin one."""
    open_ends = [
        size
        for size in range(len(text) + 1)
        for stop in stops
        if stop.startswith(text[-size:] if size else "")
    ]
    return len(text) - max(open_ends, default=0)


@given(text=letters, stops=stop_sets, cuts=st.lists(st.integers(0, 30)))
def test_any_pieces_of_a_text_are_cut_where_a_naive_search_cuts_it(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    matcher = StopMatcher(StopAutomaton(stops))
    borders = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    wanted, found = naive_cut(text, stops), None
    for start, end in pairwise(borders):
        found = matcher.push(text[start:end])
        if found is not None:
            break
        assert matcher.certain == naive_certain(text[:end], stops)
        assert wanted is None or matcher.certain <= wanted, "what a stop takes back was certain"
    assert found == wanted


@given(before=letters, text=letters, stops=stop_sets)
def test_a_stop_that_ends_before_the_matcher_is_armed_is_text(
    before: str, text: str, stops: list[str]
) -> None:
    matcher = StopMatcher(StopAutomaton(stops))
    assert matcher.push(before, armed=False) is None
    whole = before + text
    ends = [
        (end, max(sizes))
        for end in range(len(before) + 1, len(whole) + 1)
        if (sizes := [len(stop) for stop in stops if whole[:end].endswith(stop)])
    ]
    assert matcher.push(text) == (ends[0][0] - ends[0][1] if ends else None)


@pytest.mark.parametrize(
    ("stops", "text", "cut"),
    [
        (["stop"], "stop", 0),
        (["b", "abc"], "abc", 1),  # it ends first
        (["c", "bc", "abc"], "xabc", 1),  # together: the longest
        (["aab"], "aaab", 1),  # the first attempt fails within
        (["\N{PILE OF POO}é"], "a\N{PILE OF POO}é", 1),
        (["ab"], "a", None),
    ],
)
def test_known_cases(stops: list[str], text: str, cut: int | None) -> None:
    assert StopMatcher(StopAutomaton(stops)).push(text) == cut


def test_the_work_for_a_text_does_not_grow_with_the_number_of_stops() -> None:
    """Counted, not timed: every character costs a step forward and at most as many fallbacks as steps."""

    class Counting(StopAutomaton):
        lookups = 0

        def step(self, state: int, char: str) -> int:
            before = self.depth(state)
            state = super().step(state, char)
            Counting.lookups += 1 + max(0, before + 1 - self.depth(state))
            return state

    draw = random.Random(5)
    stops = ["".join(draw.choices("ab", k=12)) + "!" for _ in range(10_000)]
    automaton = Counting(stops)
    Counting.lookups = 0
    text = "".join(draw.choices("ab", k=5_000))
    assert StopMatcher(automaton).push(text) is None
    assert Counting.lookups <= 3 * len(text)


def test_an_empty_stop_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="empty"):
        StopAutomaton(["a", ""])
