"""Whatever strikes a handoff, in whichever state: right tokens or a retriable error in time, and no leak."""

import asyncio

import pytest
from fault_cases import STATES, Case, Kind, matrix
from fault_inproc import play_inproc
from fault_lane import FaultLane
from fault_table import Row
from greedy_reference import GreedyReference

pytestmark = pytest.mark.timeout(300)
"""The first case of a lane starts its processes, which takes its time on a busy machine."""

TRANSPORTS = ("shm", "tcp")
"""Those of separate processes."""
SAMPLE = {
    "shm": (
        Case(Kind.SIGKILL, "P FILLING", "P"),
        Case(Kind.SIGSTOP, "D FETCHING", "P"),
        Case(Kind.CORRUPT, "D FETCHING", what="of the first chunk"),
        Case(Kind.LINK, "D FETCHING"),
        Case(Kind.LOST, "D VERIFIED", what="release"),
        Case(Kind.REDIS, "D RESERVED"),
    ),
    "tcp": (
        Case(Kind.SIGKILL, "D COMMITTED", "D"),
        Case(Kind.SIGSTOP, "P FILLED", "D"),
        Case(Kind.CORRUPT, "D FETCHING", what="on the wire"),
        Case(Kind.LINK, "D OPEN"),
        Case(Kind.LOST, "D FETCHING", what="grant"),
        Case(Kind.REDIS, "P OPEN"),
    ),
    "inproc": (
        Case(Kind.CORRUPT, "P FILLED", what="of the last chunk"),
        Case(Kind.LOST, "P FILLED", what="filled"),
        Case(Kind.REDIS, "D FETCHING"),
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
    for transport in TRANSPORTS:
        for case in matrix(transport):
            cases.setdefault(case.name, {})[transport] = case
    return cases


@pytest.mark.parametrize("case", SAMPLE["inproc"], ids=lambda case: case.name)
async def test_each_fault_within_one_process(case: Case, reference: GreedyReference, rows: list[Row]) -> None:
    rows.append(await play_inproc(reference, case))


@pytest.mark.full
@pytest.mark.parametrize("name", by_name())
async def test_every_fault_in_every_state(name: str, lanes: dict[str, FaultLane], rows: list[Row]) -> None:
    await play(by_name()[name], lanes, rows)


@pytest.mark.full
@pytest.mark.parametrize("case", tuple(matrix("inproc")), ids=lambda case: case.name)
async def test_every_fault_within_one_process(
    case: Case, reference: GreedyReference, rows: list[Row]
) -> None:
    rows.append(await play_inproc(reference, case))


def test_the_matrix_strikes_each_side_in_each_state_on_each_transport() -> None:
    for transport, sample in SAMPLE.items():
        cases = set(matrix(transport))
        assert set(sample) <= cases
        assert {c.kind for c in sample} == {c.kind for c in cases}
        assert {c.state for c in cases if c.kind is Kind.REDIS} == set(STATES)
        for kind in () if transport == "inproc" else (Kind.SIGKILL, Kind.SIGSTOP):
            assert {(c.state, c.victim) for c in cases if c.kind is kind} == {
                (state, victim) for state in STATES for victim in "PD"
            }
