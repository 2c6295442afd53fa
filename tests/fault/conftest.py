"""`--fault-table FILE`: the fault matrix's run writes what it saw there."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_lane import FaultLane
from fault_table import Row, table, write_table
from greedy_reference import GreedyReference


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fault-table", metavar="FILE", help="write the fault matrix's table here")


@pytest.fixture(scope="session")
def reference(tiny_model: Path) -> GreedyReference:
    return GreedyReference(tiny_model)


@pytest.fixture(scope="module")
def lanes(reference: GreedyReference) -> Iterator[dict[str, FaultLane]]:
    """A cluster per transport, started by its first case."""
    lanes = {transport: FaultLane(transport, reference) for transport in ("shm", "tcp")}
    yield lanes
    for lane in lanes.values():
        lane.close()


@pytest.fixture(scope="session")
def rows(request: pytest.FixtureRequest) -> Iterator[list[Row]]:
    """What was played, in order; written, or printed, at the end."""
    rows: list[Row] = []
    yield rows
    path = request.config.getoption("--fault-table", default=None)
    if path is not None:
        write_table(rows, Path(path), "pytest tests/fault -m full --fault-table FILE")
    else:
        print("\n" + table(rows))
