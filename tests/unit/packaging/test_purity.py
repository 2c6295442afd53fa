import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
CLOCKS = {"time", "datetime", "asyncio"}


def pure_modules() -> list[str]:
    """The modules of the purity contract; import-linter keeps I/O out of them, this file clocks."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (purity,) = (contract for contract in contracts if contract["id"] == "purity")
    return list(purity["source_modules"])


def files_of(module: str) -> list[Path]:
    path = ROOT / "src" / Path(*module.split("."))
    return sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]


def imported(source: str) -> set[str]:
    """Top-level names of every import, those inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("module", pure_modules())
def test_a_pure_module_reads_no_clock(module: str) -> None:
    files = files_of(module)
    assert files
    for path in files:
        assert not imported(path.read_text()) & CLOCKS, path


def test_the_check_sees_imports_in_every_form() -> None:
    source = "import time\ndef f():\n    from datetime import date\n    import asyncio.events as e\n"
    assert imported(source) == CLOCKS


def test_every_table_and_policy_is_in_the_contract() -> None:
    found = {path.stem for path in (ROOT / "kvtransfer" / "handoff").glob("*.py")}
    pure = {module.rpartition(".")[2] for module in pure_modules() if ".handoff." in module}
    assert {"decode_side", "prefill_side", "states", "table"} <= pure <= found
