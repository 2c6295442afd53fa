"""The order and the budget of a step."""

import pytest
from engine_harness import Harness, greedy, prompt_of

from pdserve.core.errors import ConfigError, InternalError
from pdserve.core.types import OwnerId
from pdserve.workers.engine.sequence import Sequence as EngineSequence
from pdserve.workers.engine.sequence import SequenceState


def sizes(harness: Harness) -> list[int]:
    """Tokens of each chunk of the last step."""
    return [len(chunk.token_ids) for chunk in harness.runner.batches[-1].chunks]


def test_decodes_come_first_and_cost_one_token() -> None:
    harness = Harness(token_budget=34, chunk_tokens=32)
    harness.submit("a", prompt_of(16), greedy(9))
    harness.submit("b", prompt_of(16, 1), greedy(9))
    harness.step()
    harness.submit("c", prompt_of(100, 2), greedy(9))
    harness.step()
    assert sizes(harness) == [1, 1, 32]


def test_running_prefills_go_before_admissions() -> None:
    harness = Harness(token_budget=32, chunk_tokens=24)
    harness.submit("a", prompt_of(60), None)
    harness.submit("b", prompt_of(60, 1), None)
    harness.step()
    assert sizes(harness) == [24, 8]
    harness.submit("c", prompt_of(60, 2), None)
    harness.step()
    assert sizes(harness) == [24, 8]
    assert [item.num_computed for item in harness.steps[-1].items] == [48, 16]


@pytest.mark.parametrize(("weight", "allowed"), [(0.0, 16), (0.25, 25), (0.5, 50), (1.0, 99)])
def test_the_role_weight_limits_prefill_beside_decodes(weight: float, allowed: int) -> None:
    harness = Harness(token_budget=100, chunk_tokens=100, role_weight=weight)
    harness.submit("decode", prompt_of(8), greedy(50))
    harness.step()
    for number in range(3):
        harness.submit(f"p{number}", prompt_of(90, number + 1), None)
    harness.step()
    assert sizes(harness)[0] == 1
    assert sum(sizes(harness)[1:]) == allowed


def test_without_decodes_prefill_has_the_whole_budget() -> None:
    harness = Harness(token_budget=100, chunk_tokens=100, role_weight=0.0)
    harness.submit("p", prompt_of(120), None)
    harness.step()
    assert sizes(harness) == [100]


def test_a_changed_role_weight_keeps_what_runs() -> None:
    harness = Harness(token_budget=64, chunk_tokens=64)
    harness.submit("decode", prompt_of(8), greedy(50))
    harness.step()
    harness.submit("p", prompt_of(90, 1), None)
    harness.engine.set_role_weight(0.5)
    harness.step()
    assert sizes(harness) == [1, 32]
    harness.engine.set_role_weight(0.0)
    harness.step()
    assert sizes(harness) == [1, 16]


@pytest.mark.parametrize("weight", [-0.1, 1.1, float("nan")])
def test_a_role_weight_outside_of_0_to_1_is_refused(weight: float) -> None:
    with pytest.raises(ConfigError):
        Harness().engine.set_role_weight(weight)


def test_no_more_sequences_run_than_allowed() -> None:
    harness = Harness(max_sequences=2)
    for number in range(5):
        harness.submit(f"s{number}", prompt_of(10, number), greedy(6))
    most = 0
    while harness.engine.has_work:
        harness.step()
        most = max(most, harness.engine.stats().running)
    assert most == 2


def test_more_decodes_than_budget_serve_the_oldest() -> None:
    harness = Harness(token_budget=2, max_sequences=3)
    for number in range(3):
        harness.engine.submit(harness.commit(f"s{number}", prompt_of(10, number), greedy(4)))
    harness.run()
    order = [item.sequence_id for step in harness.steps for item in step.items if item.finish_reason]
    assert order == ["s0", "s1", "s2"]


def test_admission_takes_all_blocks_or_none() -> None:
    harness = Harness(pool_blocks=5)
    harness.submit("a", prompt_of(40), None)
    harness.submit("b", prompt_of(40, 1), None)
    harness.step()
    assert len(harness.pool.table(OwnerId("a"))) == 3
    assert harness.pool.table(OwnerId("b")) == ()
    assert harness.pool.counts().free == 2


def test_a_failed_admission_keeps_the_prefix_in_the_cache() -> None:
    harness = Harness(pool_blocks=5)
    harness.submit("first", prompt_of(48), greedy(1))
    harness.run()
    harness.pool.allocate(OwnerId("other"), 1)
    harness.submit("s", prompt_of(48) + prompt_of(20, 3), greedy(1))
    harness.step()
    assert harness.pool.table(OwnerId("s")) == ()
    assert harness.pool.counts().cached == 3
    harness.pool.release(OwnerId("other"))
    harness.run()
    assert harness.last("s").cached_tokens == 48


def test_a_sequence_moves_only_along_its_life() -> None:
    harness = Harness()
    sequence = EngineSequence(harness.commit("s", prompt_of(20), greedy(1)), arrival=0)
    with pytest.raises(InternalError):
        sequence.move(SequenceState.PREEMPTED)
    sequence.move(SequenceState.FINISHED)
    with pytest.raises(InternalError):
        sequence.move(SequenceState.RUNNING)
