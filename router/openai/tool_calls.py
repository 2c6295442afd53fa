"""Tool calls in a model's text, in the Hermes and Qwen format, as the text arrives.

    <tool_call>
    {"name": "get_weather", "arguments": {"city": "Paris"}}
    </tool_call>

Text that may be the beginning of a marker is held back until that is decided. The arguments of a call are
passed on while they come.
"""

import json
import re
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Final

BEGIN: Final = "<tool_call>"
END: Final = "</tool_call>"

_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*(?=\{)')
_STRUCTURE = re.compile(r'["{}\[\]\\]')
_LONGEST_HEAD: Final = 1024
"""Characters within which a call must have come to its arguments for these to be passed on early."""


@dataclass(slots=True)
class CallDelta:
    """What one piece of text adds to one call."""

    index: int
    name: str | None = None
    """On the call's first delta only."""
    arguments: str = ""


@dataclass(slots=True)
class Delta:
    """What one piece of text adds to an answer."""

    content: str = ""
    calls: list[CallDelta] = field(default_factory=list)


class _State(Enum):
    CONTENT = auto()
    """Outside of calls."""
    HEAD = auto()
    """In a call whose arguments have not begun."""
    ARGUMENTS = auto()
    TAIL = auto()
    """Between the arguments and the end marker."""
    DONE = auto()
    """After the only call that was asked for: the rest is dropped."""


class ToolCallParser:
    """One answer. `push` its text piece by piece, then `finish`."""

    def __init__(self, *, bare: bool = False, parallel: bool = True) -> None:
        """`bare`: the whole answer is one call, without markers. `parallel`: more than one call may come."""
        self._bare = bare
        self._parallel = parallel and not bare
        self._state = _State.HEAD if bare else _State.CONTENT
        self._held = ""
        self._calls = 0
        self._nesting = _Nesting()
        self._ends_tried = 0

    @property
    def calls(self) -> int:
        """Calls that have begun."""
        return self._calls

    def push(self, text: str) -> Delta:
        """What is certain with this text."""
        self._held += text
        delta = Delta()
        while self._step(delta):
            pass
        return delta

    def finish(self) -> Delta:
        """What was held back: text that was no marker, or a call that did not end."""
        delta = Delta()
        held, self._held = self._held, ""
        if self._state is _State.CONTENT:
            # What separates calls, or follows the last one, is no content.
            delta.content = held if held.strip() or not self._calls else ""
        elif self._state is _State.HEAD and not self._whole_call(held, delta):
            delta.content = held if self._bare else BEGIN + held
        self._state = _State.DONE
        return delta

    def _step(self, delta: Delta) -> bool:
        """Go on by one state; False when more text is needed."""
        match self._state:
            case _State.CONTENT:
                return self._content(delta)
            case _State.HEAD:
                return self._head(delta)
            case _State.ARGUMENTS:
                return self._arguments(delta)
            case _State.TAIL:
                return self._tail()
            case _State.DONE:
                self._held = ""
                return False

    def _content(self, delta: Delta) -> bool:
        begin = self._held.find(BEGIN)
        if begin >= 0:
            delta.content += self._held[:begin].rstrip()
            self._held = self._held[begin + len(BEGIN) :]
            self._state, self._ends_tried = _State.HEAD, 0
            return True
        certain = len(self._held) - _partial_marker(self._held, BEGIN)
        # The white space before a marker belongs to it.
        certain = len(self._held[:certain].rstrip())
        delta.content += self._held[:certain]
        self._held = self._held[certain:]
        return False

    def _head(self, delta: Delta) -> bool:
        head = _HEAD.match(self._held) if self._bare or len(self._held) <= _LONGEST_HEAD else None
        if head is not None:
            name = _json_or_none(head.group(1))
            if isinstance(name, str):
                delta.calls.append(CallDelta(self._calls, name))
                self._calls += 1
                self._held = self._held[head.end() :]
                self._state, self._nesting = _State.ARGUMENTS, _Nesting()
                return True
        if self._bare:
            return False
        # In any other order of its keys a call is passed on whole, when the text up to an end marker is JSON.
        end = self._held.find(END, self._ends_tried)
        if end < 0:
            self._ends_tried = max(self._ends_tried, len(self._held) - len(END) + 1, 0)
            return False
        if not self._whole_call(self._held[:end], delta):
            self._ends_tried = end + 1
            return True
        self._held = self._held[end + len(END) :]
        self._after_call()
        return True

    def _arguments(self, delta: Delta) -> bool:
        length = self._nesting.take(self._held)
        if length:
            piece, self._held = self._held[:length], self._held[length:]
            if delta.calls and delta.calls[-1].index == self._calls - 1:
                delta.calls[-1].arguments += piece
            else:
                delta.calls.append(CallDelta(self._calls - 1, arguments=piece))
        if not self._nesting.closed:
            return False
        self._state = _State.DONE if self._bare else _State.TAIL
        return True

    def _tail(self) -> bool:
        end = self._held.find(END)
        if end < 0:
            return False
        self._held = self._held[end + len(END) :]
        self._after_call()
        return True

    def _after_call(self) -> None:
        self._state = _State.CONTENT if self._parallel else _State.DONE

    def _whole_call(self, text: str, delta: Delta) -> bool:
        """Add the call that `text` is; False where it is none."""
        call = _json_or_none(text)
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            return False
        arguments = call.get("arguments", call.get("parameters", {}))
        encoded = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        delta.calls.append(CallDelta(self._calls, call["name"], encoded))
        self._calls += 1
        return True


class _Nesting:
    """Where a JSON object ends, in text that arrives piece by piece."""

    def __init__(self) -> None:
        self._depth = 0
        self._quoted = False
        self._escaped = False
        self.closed = False

    def take(self, text: str) -> int:
        """Characters of `text` that belong to the object."""
        position = 0
        while position < len(text):
            if self._escaped:
                self._escaped = False
                position += 1
                continue
            found = _STRUCTURE.search(text, position)
            if found is None:
                return len(text)
            position = found.end()
            self._mark(found.group())
            if self._depth == 0:
                self.closed = True
                return position
        return len(text)

    def _mark(self, sign: str) -> None:
        if self._quoted:
            self._escaped = sign == "\\"
            self._quoted = sign != '"'
        elif sign == '"':
            self._quoted = True
        elif sign in "{[":
            self._depth += 1
        elif sign in "}]":
            self._depth -= 1


def _partial_marker(text: str, marker: str) -> int:
    """Length of the longest end of `text` that is a beginning of `marker`, but not all of it."""
    for length in range(min(len(text), len(marker) - 1), 0, -1):
        if text.endswith(marker[:length]):
            return length
    return 0


def _json_or_none(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
