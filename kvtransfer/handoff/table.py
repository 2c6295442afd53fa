"""Transition tables: (state, event) → (guard, next state, instructions), as data.

A machine's value is immutable. `Table.advance` is the only code that moves one, so what a table does not say
cannot happen, and a script may change a row and see whether the exploration notices.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, Generic, Protocol, TypeVar

from pdserve.core.errors import InternalError
from pdserve.kvtransfer.handoff.events import Settle
from pdserve.kvtransfer.handoff.instructions import Instruction

StoryLine = tuple[str, str]
"""(state, event) in the order in which they met."""


class Machine(Protocol):
    """One side of one handoff: a frozen dataclass with a state among its fields."""

    @property
    def state(self) -> Any: ...


M = TypeVar("M", bound=Machine)


class IllegalTransition(InternalError):
    """The table has no row for this event in this state: a defect, told with the handoff's story."""

    def __init__(self, state: str, event: object, story: Iterable[StoryLine] = ()) -> None:
        self.state = state
        self.event = event
        self.story = (*story, (state, type(event).__name__))
        told = " > ".join(f"{name} in {where}" for where, name in self.story)
        super().__init__(f"{event} is illegal in state {state}; the handoff's story: {told}")


def always(machine: Any, event: Any) -> bool:
    return True


def unchanged(machine: Any, event: Any) -> Any:
    return machine


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a table. Where several rows match, the first whose guard holds fires.

    `update` moves the machine's other fields. `do` makes the instructions, from the
    machine *before* the step.
    """

    state: StrEnum
    event: type
    next: StrEnum
    do: tuple[Callable[[Any, Any], tuple[Instruction, ...]], ...] = ()
    guard: Callable[[Any, Any], bool] = always
    update: Callable[[Any, Any], Any] = unchanged


class Table(Generic[M]):
    """All rows of one side. Rows on Settle fire by themselves, until none does."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows = tuple(rows)
        self._by_cause: dict[tuple[StrEnum, type], list[Row]] = {}
        for row in self.rows:
            self._by_cause.setdefault((row.state, row.event), []).append(row)

    def advance(self, machine: M, event: object) -> tuple[M, tuple[Instruction, ...]]:
        """The machine after `event`, and what to do about it, in order. Raises IllegalTransition."""
        row = self._match(machine, event)
        if row is None:
            raise IllegalTransition(machine.state, event)
        machine, instructions = self._fire(row, machine, event)
        settle = Settle()
        while (row := self._match(machine, settle)) is not None:
            machine, more = self._fire(row, machine, settle)
            instructions += more
        return machine, instructions

    def _match(self, machine: M, event: object) -> Row | None:
        for row in self._by_cause.get((machine.state, type(event)), ()):
            if row.guard(machine, event):
                return row
        return None

    def _fire(self, row: Row, machine: M, event: object) -> tuple[M, tuple[Instruction, ...]]:
        instructions = tuple(item for make in row.do for item in make(machine, event))
        moved: M = replace(row.update(machine, event), state=row.next)
        return moved, instructions


class Transcript(Generic[M]):
    """The shell's handle on one machine: its present value and how it got there."""

    def __init__(self, table: Table[M], machine: M) -> None:
        self._table = table
        self.machine = machine
        self.story: list[StoryLine] = []

    def feed(self, event: object) -> tuple[Instruction, ...]:
        """Move the machine; returns what to do. Raises IllegalTransition, the machine unmoved."""
        state = str(self.machine.state)
        try:
            self.machine, instructions = self._table.advance(self.machine, event)
        except IllegalTransition as error:
            raise IllegalTransition(error.state, event, self.story) from None
        self.story.append((state, type(event).__name__))
        return instructions
