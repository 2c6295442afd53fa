"""What takes long to compile is compiled in a thread, once, and found by the engine."""

import threading

import pytest

from pdserve.core.errors import InvalidRequest
from pdserve.core.types import Constraint, ConstraintKind, SamplingParams
from pdserve.workers.text_preparation import TextPreparation

STOPS = ("stop", "here")


async def test_it_runs_in_a_thread_and_its_stops_are_found_as_long_as_they_are_held() -> None:
    threads: list[str] = []
    texts = TextPreparation(lambda constraint: threads.append(threading.current_thread().name))
    constraint = Constraint(ConstraintKind.REGEX, "a")
    held = await texts.prepare(SamplingParams(stop=STOPS, constraint=constraint))
    for number in range(200):
        texts.stops((f"{number}",))
    assert isinstance(held, tuple)
    assert held[0] is texts.stops(STOPS)
    assert len(threads) == 1
    assert threads != [threading.main_thread().name]


async def test_what_is_wrong_is_said() -> None:
    def refuse(constraint: Constraint) -> None:
        raise InvalidRequest(f"{constraint.source} is wrong")

    texts = TextPreparation(refuse)
    with pytest.raises(InvalidRequest, match="x is wrong"):
        await texts.prepare(SamplingParams(constraint=Constraint(ConstraintKind.REGEX, "x")))
