"""Whatever strikes a handoff, in whichever state: right tokens or a retriable error in time, and no leak."""

import asyncio
import itertools

import pytest
from fault_cases import STATES, Case, Kind, matrix
from fault_lane import FaultLane
from fault_table import Row

TRANSPORTS = ("shm", "tcp")
SAMPLE = {
    "shm": (
        Case(Kind.SIGKILL, "P FILLING", "P"),
        Case(Kind.SIGSTOP, "D FETCHING", "P"),
        Case(Kind.CORRUPT, "D FETCHING", what="of the first chunk"),
        Case(Kind.LINK, "D FETCHING"),
        Case(Kind.LOST, "D VERIFIED", what="released"),
        Case(Kind.REDIS, "D RESERVED"),
    ),
    "tcp": (
        Case(Kind.SIGKILL, "D COMMITTED", "D"),
        Case(Kind.SIGSTOP, "P FILLED", "D"),
        Case(Kind.CORRUPT, "D FETCHING", what="on the wire"),
        Case(Kind.LINK, "D OPEN"),
        Case(Kind.LOST, "D OPEN", what="opened"),
        Case(Kind.REDIS, "P OPEN"),
    ),
}
"""For every run: each fault once on each transport, in changing states."""


async def play(cases: dict[str, Case], lanes: dict[str, FaultLane], rows: list[Row]) -> None:
    """One case per transport, at the same time on two clusters."""
    played = await asyncio.gather(
        *(lanes[transport].play(case) for transport, case in cases.items()), return_exceptions=True
    )
    rows += [row for row in played if isinstance(row, Row)]
    failed = [failure for failure in played if isinstance(failure, BaseException)]
    if failed:
        raise AssertionError("\n\n".join(map(str, failed))) from failed[0]


@pytest.mark.parametrize("kind", Kind, ids=lambda kind: kind.name.lower())
async def test_each_fault_in_one_state(kind: Kind, lanes: dict[str, FaultLane], rows: list[Row]) -> None:
    cases = {transport: next(c for c in SAMPLE[transport] if c.kind is kind) for transport in TRANSPORTS}
    await play(cases, lanes, rows)


def by_name() -> dict[str, dict[str, Case]]:
    """Case name -> the transports on which there is such a case."""
    cases: dict[str, dict[str, Case]] = {}
    for transport, case in itertools.chain(*(((t, c) for c in matrix(t)) for t in TRANSPORTS)):
        cases.setdefault(case.name, {})[transport] = case
    return cases


@pytest.mark.full
@pytest.mark.parametrize("name", by_name())
async def test_every_fault_in_every_state(name: str, lanes: dict[str, FaultLane], rows: list[Row]) -> None:
    await play(by_name()[name], lanes, rows)


def test_the_matrix_strikes_each_side_in_each_state_on_each_transport() -> None:
    for transport in TRANSPORTS:
        cases = set(matrix(transport))
        for kind in (Kind.SIGKILL, Kind.SIGSTOP):
            assert {(c.state, c.victim) for c in cases if c.kind is kind} == {
                (state, victim) for state in STATES for victim in "PD"
            }
        assert {c.state for c in cases if c.kind is Kind.REDIS} == set(STATES)
        assert set(SAMPLE[transport]) <= cases
        assert {c.kind for c in SAMPLE[transport]} == set(Kind)
