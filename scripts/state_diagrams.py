"""Write docs/handoff-states.md from the handoff's tables: diagrams, every row, what each instruction means.

PYTHONPATH=src python scripts/state_diagrams.py            write the file
PYTHONPATH=src python scripts/state_diagrams.py --check    exit with 1 where the committed one differs
"""

import inspect
import re
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import Any, get_args

from pdserve.kvtransfer.handoff import events, instructions
from pdserve.kvtransfer.handoff.decode_side import DECODE_TABLE, TERMINAL, DecodeHandoff
from pdserve.kvtransfer.handoff.prefill_side import PREFILL_TABLE, PrefillHandoff
from pdserve.kvtransfer.handoff.states import DecodeState, PrefillState
from pdserve.kvtransfer.handoff.table import Row, always

TARGET = Path(__file__).resolve().parents[1] / "docs" / "handoff-states.md"

HEAD = """# The states of a handoff

Made by `scripts/state_diagrams.py` from the tables that the code runs (`kvtransfer/handoff/decode_side.py`,
`kvtransfer/handoff/prefill_side.py`); a test fails when this page and they differ. Do not edit it.

A transition is `Event`, or `Event [guard]` where a condition has to hold too. Where several rows of a state
have the same event, the first whose guard holds fires; an event without a row in a state is a defect and
raises `IllegalTransition` with the handoff's story. `Settle` comes by itself after every event, until nothing
fires.
The tables have every row in its order, with what it makes.
"""


def main(arguments: list[str]) -> int:
    page = made()
    if arguments == ["--check"]:
        same = TARGET.exists() and TARGET.read_text() == page
        print(f"{TARGET.name} is {'as' if same else 'not what'} the tables say")
        return not same
    TARGET.write_text(page)
    return 0


def made() -> str:
    """The whole page."""
    return "\n".join(
        (
            HEAD,
            *_side("D, who fetches", DECODE_TABLE.rows, DecodeHandoff(tokens=1).state, TERMINAL),
            *_side("P, who prefills", PREFILL_TABLE.rows, PrefillHandoff().state, {PrefillState.RELEASED}),
            *_instructions(),
            *_events(),
        )
    )


def _side(title: str, rows: tuple[Row, ...], first: StrEnum, last: Iterable[StrEnum]) -> Iterator[str]:
    states: type[DecodeState] | type[PrefillState]
    states = DecodeState if isinstance(first, DecodeState) else PrefillState
    yield f"## {title}\n"
    yield "```mermaid"
    yield from _diagram(rows, first, [state for state in states if state in set(last)])
    yield "```\n"
    yield "| state | meaning |\n|---|---|"
    meanings = _meanings(states)
    for state in states:
        yield f"| `{state.name}` | {meanings[state.name]} |"
    yield "\n| state | event | guard | next state | makes |\n|---|---|---|---|---|"
    for row in rows:
        guard = "" if row.guard is always else f"`{row.guard.__name__}`"
        makes = ", ".join(f"`{_name(maker)}`" for maker in row.do)
        yield f"| `{row.state.name}` | `{row.event.__name__}` | {guard} | `{row.next.name}` | {makes} |"
    yield "\n| guard | holds when |\n|---|---|"
    for guard_of in dict.fromkeys(row.guard for row in rows if row.guard is not always):
        yield f"| `{guard_of.__name__}` | {_first_line(guard_of) or _source(guard_of)} |"
    yield ""


def _diagram(rows: Iterable[Row], first: StrEnum, last: Iterable[StrEnum]) -> Iterator[str]:
    """One arrow per pair of states, with a line for each row that takes it."""
    arrows: dict[tuple[StrEnum, StrEnum], list[str]] = {}
    for row in rows:
        guard = "" if row.guard is always else f" [{row.guard.__name__}]"
        arrows.setdefault((row.state, row.next), []).append(f"{row.event.__name__}{guard}")
    yield "stateDiagram-v2"
    yield f"    [*] --> {first.name}"
    for (state, following), causes in arrows.items():
        yield f"    {state.name} --> {following.name} : {'<br/>'.join(causes)}"
    for state in last:
        yield f"    {state.name} --> [*]"


def _instructions() -> Iterator[str]:
    yield "## Instructions\n"
    yield "What the shells (`decode_attempt.py`, `prefill_session.py`) carry out, in the order in which a row"
    yield "makes them. The names in the tables' last column are the functions that make them.\n"
    yield "| instruction | carries | side | what to do |\n|---|---|---|---|"
    makers = {"D": _instructions_of(DECODE_TABLE.rows), "P": _instructions_of(PREFILL_TABLE.rows)}
    for kind in get_args(instructions.Instruction):
        sides = ", ".join(side for side, names in makers.items() if kind.__name__ in names)
        carries = ", ".join(f"`{field}`" for field in kind.__slots__)
        yield f"| `{kind.__name__}` | {carries} | {sides} | {_meaning(kind)} |"
    yield ""


def _events() -> Iterator[str]:
    yield "## Events\n"
    yield "| event | carries | meaning |\n|---|---|---|"
    for kind in dict.fromkeys(row.event for row in (*DECODE_TABLE.rows, *PREFILL_TABLE.rows)):
        assert kind.__module__ == events.__name__, kind
        carries = ", ".join(f"`{field}`" for field in getattr(kind, "__slots__", ()))
        yield f"| `{kind.__name__}` | {carries} | {_meaning(kind)} |"
    yield ""


def _instructions_of(rows: Iterable[Row]) -> set[str]:
    """Names of the instructions that the rows' makers, and what those call, can make."""
    found: set[str] = set()
    codes = [maker.__code__ for row in rows for maker in row.do if isinstance(maker, types.FunctionType)]
    module = sys.modules[next(iter(rows)).do[0].__module__]
    seen: set[types.CodeType] = set()
    while codes:
        code = codes.pop()
        if code in seen:
            continue
        seen.add(code)
        codes += [part for part in code.co_consts if isinstance(part, types.CodeType)]
        for name in code.co_names:
            called = getattr(module, name, None)
            if isinstance(called, types.FunctionType) and called.__module__ == module.__name__:
                codes.append(called.__code__)
            if hasattr(instructions, name):
                found.add(name)
    return found


def _name(maker: Callable[..., Any]) -> str:
    """A maker's name; of one that another function made, that function's."""
    return maker.__qualname__.partition(".")[0]


def _meaning(kind: type) -> str:
    """The docstring's first paragraph; nothing for the one that a dataclass gives itself."""
    text = inspect.getdoc(kind) or ""
    return "" if text.startswith(f"{kind.__name__}(") else " ".join(text.partition("\n\n")[0].split())


def _meanings(states: type[StrEnum]) -> dict[str, str]:
    """The string behind each member of the enum, as its source has it."""
    found = dict(re.findall(r'^    (\w+) = .*\n    """(.*)"""$', inspect.getsource(states), re.MULTILINE))
    assert found.keys() == {state.name for state in states}, f"a state of {states.__name__} says nothing"
    return found


def _first_line(function: Callable[..., Any]) -> str:
    return (inspect.getdoc(function) or "").partition("\n")[0]


def _source(function: Callable[..., Any]) -> str:
    """What a guard of one expression returns."""
    body = inspect.getsource(function).partition("return ")[2]
    return f"`{' '.join(body.split())}`"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
