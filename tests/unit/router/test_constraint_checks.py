"""Compile checks at the door: each source once, one at a time, off the loop."""

import asyncio
import threading

import pytest

from pdserve.core.errors import InvalidRequest
from pdserve.core.types import Constraint, ConstraintKind
from pdserve.router.constraint_checks import REMEMBERED, ConstraintChecks


class Compiler:
    """Refuses what contains `wrong`; says in which threads it ran, and how many at once."""

    def __init__(self) -> None:
        self.seen: list[Constraint] = []
        self.threads: set[int] = set()
        self.most_at_once = 0
        self._running = 0

    def __call__(self, constraint: Constraint) -> None:
        self._running += 1
        self.most_at_once = max(self.most_at_once, self._running)
        self.seen.append(constraint)
        self.threads.add(threading.get_ident())
        self._running -= 1
        if "wrong" in constraint.source:
            raise InvalidRequest(f"{constraint.source[:5]!r} does not compile")


def regex(source: str) -> Constraint:
    return Constraint(ConstraintKind.REGEX, source)


async def test_a_verdict_is_remembered_whatever_it_was() -> None:
    compiler = Compiler()
    checks = ConstraintChecks(compiler)
    for _ in range(3):
        await checks.check(regex("fine"))
        with pytest.raises(InvalidRequest, match="'wrong' does not compile"):
            await checks.check(regex("wrong"))
    assert [constraint.source for constraint in compiler.seen] == ["fine", "wrong"]


async def test_the_same_text_of_another_kind_is_another_constraint() -> None:
    compiler = Compiler()
    checks = ConstraintChecks(compiler)
    await checks.check(regex("{}"))
    await checks.check(Constraint(ConstraintKind.JSON_SCHEMA, "{}"))
    assert len(compiler.seen) == 2


async def test_sources_compile_off_the_loop_and_one_at_a_time() -> None:
    compiler = Compiler()
    checks = ConstraintChecks(compiler)
    sources = [f"n{number}" for number in range(4)]
    await asyncio.gather(*(checks.check(regex(source)) for source in sources))
    assert len(compiler.seen) == 4
    assert compiler.most_at_once == 1
    assert threading.get_ident() not in compiler.threads


async def test_those_that_wait_for_the_same_source_compile_it_once() -> None:
    compiler = Compiler()
    checks = ConstraintChecks(compiler)
    await asyncio.gather(*(checks.check(regex("x")) for _ in range(3)))
    assert len(compiler.seen) == 1


async def test_the_memory_is_bounded_and_the_oldest_goes_first() -> None:
    compiler = Compiler()
    checks = ConstraintChecks(compiler)
    await checks.check(regex("first"))
    await checks.check(regex("second"))
    await checks.check(regex("first"))
    for number in range(REMEMBERED - 1):
        await checks.check(regex(f"n{number}"))
    assert len(checks) == REMEMBERED
    compiler.seen.clear()
    await checks.check(regex("first"))
    await checks.check(regex("second"))
    assert [constraint.source for constraint in compiler.seen] == ["second"]


async def test_a_defect_of_the_compiler_is_not_remembered() -> None:
    failures = [RuntimeError("broken")]

    def compiles(constraint: Constraint) -> None:
        if failures:
            raise failures.pop()

    checks = ConstraintChecks(compiles)
    with pytest.raises(RuntimeError):
        await checks.check(regex("a"))
    await checks.check(regex("a"))
