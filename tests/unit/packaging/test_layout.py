import importlib.util
import tomllib
from collections import Counter
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import pdserve
from pdserve.cli.entry import SERVE_MODULES

ROOT = Path(__file__).parents[3]
PACKAGE = ROOT / "src" / "pdserve"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def requirements(*extras: str) -> list[Requirement]:
    lines = list(PROJECT["dependencies"])
    for extra in extras:
        lines += PROJECT["optional-dependencies"][extra]
    return [Requirement(line) for line in lines]


def test_the_tests_see_the_sources_beside_them() -> None:
    assert pdserve.__file__ is not None
    assert Path(pdserve.__file__).resolve() == PACKAGE / "__init__.py"
    assert pdserve.__version__ == PROJECT["version"]


def test_every_folder_of_the_package_is_a_relative_link_into_the_root() -> None:
    links = [entry for entry in PACKAGE.iterdir() if entry.is_dir() and entry.name != "__pycache__"]
    assert {link.name for link in links} >= {
        "core",
        "proto",
        "client",
        "cli",
        "router",
        "kvtransfer",
        "workers",
    }
    for link in links:
        assert link.is_symlink(), link
        assert str(link.readlink()) == f"../../{link.name}"
        assert (ROOT / link.name).is_dir()


def test_neither_the_root_nor_proto_is_a_regular_package() -> None:
    assert not (ROOT / "__init__.py").exists()
    assert not (ROOT / "proto" / "__init__.py").exists()
    assert not (ROOT / "tests" / "__init__.py").exists()


def test_test_modules_have_names_of_their_own() -> None:
    counts = Counter(path.name for path in (ROOT / "tests").rglob("*.py") if path.name != "conftest.py")
    assert [name for name, count in counts.items() if count > 1] == []


def test_every_requirement_is_pinned_at_a_version_that_it_allows() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    torch = next(r for r in requirements("serve") if r.name == "torch")
    assert canonicalize_name(torch.name) not in pins, "the Makefile chooses torch"
    for requirement in requirements("serve", "dev"):
        if requirement.name != "torch":
            pin = pins[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(pin), f"{requirement} but {pin}"


def test_the_client_needs_grpcio_and_protobuf_only() -> None:
    assert {requirement.name for requirement in requirements()} == {"grpcio", "protobuf"}


@pytest.mark.parametrize("module", SERVE_MODULES)
def test_the_shim_knows_modules_that_exist(module: str) -> None:
    assert importlib.util.find_spec(module) is not None


def test_the_shim_knows_a_module_for_each_requirement_of_the_extra() -> None:
    assert len(SERVE_MODULES) == len(PROJECT["optional-dependencies"]["serve"])
