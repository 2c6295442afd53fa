"""docs/handoff-states.md is what the tables say, and draws all of it."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import pytest

from pdserve.kvtransfer.handoff.decode_side import DECODE_TABLE
from pdserve.kvtransfer.handoff.instructions import Instruction
from pdserve.kvtransfer.handoff.prefill_side import PREFILL_TABLE
from pdserve.kvtransfer.handoff.table import Table, always

ROOT = Path(__file__).resolve().parents[3]
ARROW = re.compile(r"^    (\S+) --> (\S+?)(?: : ([^:;\n]+))?$")
"""What mermaid reads: a label has no colon, no semicolon and no end of line."""


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("state_diagrams", ROOT / "scripts" / "state_diagrams.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_committed_page_is_what_the_tables_say(script: ModuleType) -> None:
    page = (ROOT / "docs" / "handoff-states.md").read_text()
    assert page == script.made(), "run PYTHONPATH=src python scripts/state_diagrams.py"


def test_a_page_that_differs_is_noticed(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "TARGET", tmp_path / "handoff-states.md")
    assert script.main(["--check"])
    assert not script.main([])
    assert not script.main(["--check"])
    script.TARGET.write_text(script.made().replace("Cancelled", "Forgotten", 1))
    assert script.main(["--check"])


@pytest.mark.parametrize(("side", "table"), [(0, DECODE_TABLE), (1, PREFILL_TABLE)], ids=["D", "P"])
def test_every_row_is_on_its_arrow(script: ModuleType, side: int, table: Table[Any]) -> None:
    diagram = re.findall(r"```mermaid\nstateDiagram-v2\n(.*?)```", script.made(), re.DOTALL)[side]
    arrows: dict[tuple[str, str], list[str]] = {}
    for line in diagram.splitlines():
        matched = ARROW.match(line)
        assert matched is not None, line
        state, following, label = matched.groups()
        arrows[state, following] = (label or "").split("<br/>")
    for row in table.rows:
        guard = "" if row.guard is always else f" [{row.guard.__name__}]"
        assert f"{row.event.__name__}{guard}" in arrows[row.state.name, row.next.name]


def test_every_instruction_has_a_side(script: ModuleType) -> None:
    table = script.made().partition("## Instructions")[2].partition("## Events")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| `")]
    assert [row[0].strip("`") for row in rows] == [kind.__name__ for kind in get_args(Instruction)]
    for name, _, side, meaning in rows:
        assert side in ("D", "P", "D, P"), name
        assert meaning.strip(), name
