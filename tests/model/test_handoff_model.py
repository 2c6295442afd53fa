"""Every reachable state of the handoff, in worlds that each raise one bound.

Safety in every state: no block is free, or anybody else's, while a transport may write it or a reader reads
it; D commits only what P had filled and answered ok, all of it landed and checked; who ended left nothing
behind; no pool gives out more than it has; nothing illegal happens. Liveness: every state reaches an end by
steps that happen if one only waits. Without a fault, everybody is served.
"""

import sys
from pathlib import Path

import pytest
from handoff_explorer import explore
from handoff_instances import large, small

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from handoff_mutations import MUTATIONS, Mutation, caught, main


@pytest.mark.timeout(300)  # half a minute of pure computing, on a core of its own
@pytest.mark.parametrize("name", small())
def test_every_state_is_safe_and_can_end(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    report = explore(small()[name])
    with capsys.disabled():
        print(f"\n{report}")
    assert report.states > 500  # a world that lost its steps would be safe, too
    assert report.commits >= 1
    assert report.ends > report.commits


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", large())
def test_products_of_the_raised_bounds_are_safe_and_can_end(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    report = explore(large()[name])
    with capsys.disabled():
        print(f"\n{report}")
    assert report.states > 100_000
    assert report.commits >= 1


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_broken_table_is_noticed(mutation: Mutation) -> None:
    assert caught(mutation) is not None


def test_survivors_fail_the_script(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("handoff_mutations.caught", lambda mutation: None)
    assert main(["D does not wait for digests"]) == 1
    assert "SURVIVED" in capsys.readouterr().out
