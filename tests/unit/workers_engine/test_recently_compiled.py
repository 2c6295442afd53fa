"""Compiled once while anybody needs it, and forgotten after."""

import gc

import pytest

from pdserve.core.errors import InvalidRequest
from pdserve.workers.engine.recently_compiled import RecentlyCompiled


class Compiled:
    """Of a source."""

    def __init__(self, source: str) -> None:
        self.source = source


class Compiler:
    """Counts what it compiles; refuses what is wrong."""

    def __init__(self) -> None:
        self.sources: list[str] = []

    def __call__(self, source: str) -> Compiled:
        self.sources.append(source)
        if source == "wrong":
            raise InvalidRequest("wrong")
        return Compiled(source)


def test_what_somebody_holds_is_found_however_many_came_after() -> None:
    compiler = Compiler()
    compiled = RecentlyCompiled[str, Compiled](compiler, 2)
    held = compiled.get("held")
    for number in range(10):
        compiled.get(f"{number}")
    assert compiled.get("held") is held
    assert compiler.sources.count("held") == 1


def test_only_the_last_ones_stay_that_nobody_holds() -> None:
    compiler = Compiler()
    compiled = RecentlyCompiled[str, Compiled](compiler, 2)
    for source in ("a", "b", "a", "c"):
        compiled.get(source)
    gc.collect()
    compiled.get("a")
    compiled.get("b")
    assert compiler.sources == ["a", "b", "c", "b"]


def test_an_error_is_raised_each_time() -> None:
    compiler = Compiler()
    compiled = RecentlyCompiled[str, Compiled](compiler, 2)
    for _ in range(2):
        with pytest.raises(InvalidRequest):
            compiled.get("wrong")
    assert compiler.sources == ["wrong"] * 2
