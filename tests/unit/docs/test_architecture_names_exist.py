"""docs/architecture.md and the ADRs name files, classes and tests; all of them exist."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
FOLDERS = (
    "core",
    "proto",
    "client",
    "cli",
    "bench",
    "router",
    "kvtransfer",
    "workers",
    "cluster",
    "tests",
    "scripts",
)
ARCHITECTURE = ROOT / "docs" / "architecture.md"
PAGES = (ARCHITECTURE, *sorted((ROOT / "docs" / "adr").glob("*.md")))

CODE_BLOCK = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)#:]+)\)")
TEST_ID = re.compile(r"(?P<file>test_\w+\.py)::(?P<name>\w+)")
PATH = re.compile(r"[\w.-]+(/[\w.-]+)*/?")
CLASS = re.compile(
    r"(?P<name>[A-Z][a-z]\w*[A-Z]\w*|Worker|Engine|Shell|Scheduler|Cluster)(\.(?P<member>\w+))?"
)


def spans(page: Path) -> list[str]:
    """Everything in single backticks outside of code blocks."""
    return [span.replace("\\", "") for span in SPAN.findall(CODE_BLOCK.sub("", page.read_text()))]


@cache
def definitions() -> dict[str, set[str]]:
    """Class name to the names of its members, over all sources."""
    found: dict[str, set[str]] = {}
    for folder in FOLDERS:
        for source in (ROOT / folder).rglob("*.py"):
            if source.name.endswith(("_pb2.py", "_pb2_grpc.py")):
                continue
            for node in ast.walk(ast.parse(source.read_text())):
                if isinstance(node, ast.ClassDef):
                    found.setdefault(node.name, set()).update(members_of(node))
    return found


def members_of(definition: ast.ClassDef) -> set[str]:
    """Methods and annotated fields."""
    members: set[str] = set()
    for child in definition.body:
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            members.add(child.name)
        elif isinstance(child, ast.AnnAssign) and isinstance(child.target, ast.Name):
            members.add(child.target.id)
    return members


@cache
def named_tests() -> dict[str, set[str]]:
    """Test functions, and classes or assigned test cases, of every test file."""
    found: dict[str, set[str]] = {}
    for source in (ROOT / "tests").rglob("test_*.py"):
        names: set[str] = set()
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Assign):
                names.update(target.id for target in node.targets if isinstance(target, ast.Name))
        found[source.name] = {name for name in names if name.lower().startswith("test")}
    return found


def is_path(span: str) -> bool:
    """A file or a folder of the repository, not an option or an expression."""
    named = "/" in span or span.endswith((".py", ".proto", ".toml", ".md", ".lua", ".sh"))
    everywhere = span == "__init__.py" or span.startswith("pdserve.v1")
    return named and PATH.fullmatch(span) is not None and not everywhere


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_path_exists(page: Path) -> None:
    named = {span for span in spans(page) if is_path(span) and "::" not in span}
    missing = {path for path in named if not (ROOT / path).exists()}
    assert not missing, f"{page.name} names what is not there: {sorted(missing)}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    missing = {link for link in LINK.findall(page.read_text()) if not (page.parent / link).exists()}
    assert not missing, f"{page.name} links to what is not there: {sorted(missing)}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_test_exists(page: Path) -> None:
    named = [match for span in spans(page) if (match := TEST_ID.fullmatch(span))]
    missing = {m.group() for m in named if m["name"] not in named_tests().get(m["file"], set())}
    assert not missing, f"{page.name} names tests that are not there: {sorted(missing)}"
    # What looks like a test and was not read as one would never be missed.
    assert all(TEST_ID.fullmatch(span) for span in spans(page) if "::" in span)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_class_exists(page: Path) -> None:
    missing = set()
    for span in spans(page):
        match = CLASS.fullmatch(span)
        if match is None:
            continue
        members = definitions().get(match["name"])
        if members is None or (match["member"] and match["member"] not in members):
            missing.add(span)
    assert not missing, f"{page.name} names classes that are not there: {sorted(missing)}"


def test_every_class_lives_in_the_file_named_beside_it() -> None:
    beside = re.findall(r"`([A-Z]\w+)(?:\.\w+)?`\s+\(`([\w/.]+\.py)`", ARCHITECTURE.read_text())
    assert len(beside) > 20
    elsewhere = [
        (name, path)
        for name, path in beside
        if not re.search(rf"^class {name}\b", (ROOT / path).read_text(), re.MULTILINE)
    ]
    assert not elsewhere, f"classes that are not in the file named beside them: {elsewhere}"


def test_every_invariant_has_a_row_and_a_test() -> None:
    """One row or more for each of the twelve; each row names a test, or says that nothing holds it yet."""
    table = ARCHITECTURE.read_text().split("## The invariants and their tests")[1]
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| ")]
    body = [row for row in rows if row[0] != "| #"]
    assert [row[0].strip("| ") for row in body if row[0].strip("| ")] == [str(n) for n in range(1, 13)]
    unheld = [row[1] for row in body if "::" not in row[2] and "**Not yet" not in row[2]]
    assert not unheld, f"no test and no word about it: {unheld}"


def test_the_check_reads_what_it_should() -> None:
    """A page without names would pass everything."""
    found = spans(ARCHITECTURE)
    assert sum(1 for span in found if TEST_ID.fullmatch(span)) > 50
    assert sum(1 for span in found if is_path(span)) > 50
    assert sum(1 for span in found if CLASS.fullmatch(span)) > 30
    assert is_path("router/gate.py")
    assert not is_path("max_tokens")
