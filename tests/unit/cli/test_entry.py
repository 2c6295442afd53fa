import ast
import os
import sys
from pathlib import Path

import pytest

from pdserve.cli import entry


@pytest.fixture
def base_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if typer and rich were not there."""
    monkeypatch.setattr(entry, "missing_modules", lambda names: names)


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["pdserve", *arguments])
    return entry.main()


@pytest.mark.usefixtures("base_install")
def test_a_command_without_the_extra_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "serve", "--prefill", "1") == 2
    assert "pip install 'pdserve[serve]'" in capsys.readouterr().err


@pytest.mark.usefixtures("base_install")
def test_help_without_the_extra_is_shown_and_names_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "--help") == 0
    assert "pdserve[serve]" in capsys.readouterr().out
    assert call(monkeypatch) == 2
    assert "pdserve[serve]" in capsys.readouterr().err


def test_a_missing_serve_module_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(arguments: list[str]) -> int:
        raise ModuleNotFoundError("No module named 'torch.nn'", name="torch.nn")

    monkeypatch.setattr("pdserve.cli.app.run", run)
    assert call(monkeypatch, "serve") == 2
    printed = capsys.readouterr().err
    assert "needs torch" in printed
    assert "pip install 'pdserve[serve]'" in printed


def test_any_other_missing_module_keeps_its_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(arguments: list[str]) -> int:
        raise ModuleNotFoundError("No module named 'pdserve.nowhere'", name="pdserve.nowhere")

    monkeypatch.setattr("pdserve.cli.app.run", run)
    with pytest.raises(ModuleNotFoundError):
        call(monkeypatch, "serve")


def test_with_the_extra_the_commands_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "--version") == 0
    assert capsys.readouterr().out.startswith("pdserve ")


def test_the_shim_imports_the_standard_library_only() -> None:
    tree = ast.parse(Path(entry.__file__).read_text())
    names = {name.name for node in tree.body if isinstance(node, ast.Import) for name in node.names}
    names |= {node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in names} - sys.stdlib_module_names == {"pdserve"}
    assert "pdserve" in names  # The version alone, from a package that imports nothing.


def test_grpc_writes_no_lines_of_its_own_between_those_of_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pdserve.cli.app.run", lambda arguments: 0)
    for command, quiet in (("chat", True), ("generate", True), ("serve", False)):
        monkeypatch.setattr(os, "environ", {})
        assert call(monkeypatch, command) == 0
        assert ("GRPC_VERBOSITY" in os.environ) is quiet
    monkeypatch.setattr(os, "environ", {"GRPC_VERBOSITY": "DEBUG"})
    assert call(monkeypatch, "chat") == 0
    assert os.environ["GRPC_VERBOSITY"] == "DEBUG", "who asks for more gets it"
