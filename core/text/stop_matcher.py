"""Finds stop strings in a text that comes in pieces, at a cost that does not grow with their number.

Aho and Corasick, "Efficient string matching: an aid to bibliographic search" (1975), over characters.
"""

from collections import deque
from collections.abc import Iterable

from pdserve.core.errors import InvalidRequest


class StopAutomaton:
    """A trie of the stops with fallback links. Read-only once made, so that many matchers may share one.

    A state is the longest end of the text so far that begins some stop; state 0 is the empty one.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        """Time and memory in the stops' characters. Raises InvalidRequest for an empty stop."""
        self._children: list[dict[str, int]] = [{}]
        self._depth = [0]
        self._fallback = [0]
        self._stop_chars = [0]
        for stop in stops:
            if not stop:
                raise InvalidRequest("a stop string is empty: leave it out or give a text")
            self._stop_chars[self._insert(stop)] = len(stop)
        self._link()

    def step(self, state: int, char: str) -> int:
        """The state after one more character; amortised constant time."""
        while True:
            following = self._children[state].get(char)
            if following is not None:
                return following
            if not state:
                return 0
            state = self._fallback[state]

    def depth(self, state: int) -> int:
        """Characters at the end of the text that may be the beginning of a stop."""
        return self._depth[state]

    def stop_chars(self, state: int) -> int:
        """Length of the longest stop that the text ends with; 0 where it ends with none."""
        return self._stop_chars[state]

    def _insert(self, stop: str) -> int:
        state = 0
        for char in stop:
            following = self._children[state].get(char)
            if following is None:
                following = len(self._children)
                self._children[state][char] = following
                self._children.append({})
                self._depth.append(self._depth[state] + 1)
                self._fallback.append(0)
                self._stop_chars.append(0)
            state = following
        return state

    def _link(self) -> None:
        """Breadth first: a fallback is shorter than its state, so it is complete before."""
        queue = deque(self._children[0].values())
        while queue:
            state = queue.popleft()
            if not self._stop_chars[state]:
                self._stop_chars[state] = self._stop_chars[self._fallback[state]]
            for char, child in self._children[state].items():
                self._fallback[child] = self.step(self._fallback[state], char)
                queue.append(child)


class StopMatcher:
    """One text against one automaton. Positions are characters since the text's beginning.

    Of several stops the one that ends first counts, of those that end together the longest.
    """

    def __init__(self, automaton: StopAutomaton) -> None:
        self._automaton = automaton
        self._state = 0
        self._position = 0

    @property
    def certain(self) -> int:
        """Where the text ends that no stop can begin in any more, whatever follows."""
        return self._position - self._automaton.depth(self._state)

    def push(self, text: str, *, armed: bool = True) -> int | None:
        """Take the next piece; where the text is to be cut, if a stop ends in this piece.

        A stop that ends while the matcher is not `armed` is text like any other. Push nothing after a match.
        """
        automaton, state = self._automaton, self._state
        for char in text:
            state = automaton.step(state, char)
            self._position += 1
            if armed and (stop := automaton.stop_chars(state)):
                self._state = state
                return self._position - stop
        self._state = state
        return None
