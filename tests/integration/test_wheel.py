"""The wheel, built from the sdist, in a clean environment without extras."""

import stat
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SUFFIXES = {".py", ".pyi", ".proto", ".lua", ".cpp", ".cu", ".typed"}

pytestmark = pytest.mark.timeout(300)


def run(
    *command: str | Path, check: bool = True, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, text=True, capture_output=True, stdin=subprocess.DEVNULL
    )
    if check:
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    # Without further options `build` makes the sdist first and the wheel from it.
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def clean(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment with the wheel and its base requirements only."""
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    run(python, "-I", "-m", "pip", "install", "-qq", "-c", ROOT / "constraints.txt", wheel)
    return folder / "bin"


def test_the_wheel_holds_every_source_as_a_real_file(wheel: Path) -> None:
    package = ROOT / "src" / "pdserve"
    # Folder by folder: the links lead into the root.
    folders = [entry for entry in package.iterdir() if entry.is_dir() and entry.name != "__pycache__"]
    sources = {
        f"pdserve/{folder.name}/{path.relative_to(folder.resolve())}"
        for folder in folders
        for path in folder.resolve().rglob("*")
        if path.suffix in SUFFIXES
    }
    with zipfile.ZipFile(wheel) as archive:
        members = {member.filename: member for member in archive.infolist()}
    assert {"pdserve/__init__.py", "pdserve/py.typed"} | sources == {
        name for name in members if not name.partition("/")[0].endswith(".dist-info")
    }
    assert {Path(name).suffix for name in sources} >= {".py", ".pyi", ".proto", ".lua", ".cpp"}
    for name, member in members.items():
        assert not stat.S_ISLNK(member.external_attr >> 16), name


def test_the_base_install_computes_and_serves_nothing(clean: Path) -> None:
    listed = run(clean / "python", "-I", "-m", "pip", "list", "--format=freeze").stdout
    names = {line.partition("==")[0].lower().replace("_", "-") for line in listed.splitlines()}
    assert {"pdserve", "grpcio", "protobuf"} <= names
    assert names <= {
        "pdserve",
        "grpcio",
        "protobuf",
        "typing-extensions",
        "pip",
        "setuptools",
    }


def test_the_client_works_in_the_base_install(clean: Path, tmp_path: Path) -> None:
    code = (
        "from pdserve.client import AsyncClient, Client\n"
        "from pdserve.core.errors import Unavailable\n"
        "with Client('127.0.0.1:1', timeout=5) as client:\n"
        "    try:\n"
        "        client.generate('hello')\n"
        "    except Unavailable as error:\n"
        "        print('unavailable:', error)\n"
    )
    assert run(clean / "python", "-I", "-c", code, cwd=tmp_path).stdout.startswith("unavailable:")


@pytest.mark.parametrize("arguments", [["serve"], ["generate", "hello"], ["serve", "--prefill", "1"]])
def test_a_command_of_the_base_install_names_the_extra(clean: Path, arguments: list[str]) -> None:
    done = run(clean / "pdserve", *arguments, check=False)
    assert done.returncode == 2
    assert "pip install 'pdserve[serve]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_help_of_the_base_install_names_the_extra(clean: Path) -> None:
    assert "pip install 'pdserve[serve]'" in run(clean / "pdserve", "--help").stdout
