"""Preemption, waiting for memory, aborts and failures: nothing lost, nothing said twice, no block left."""

import pytest
from engine_harness import Harness, expected_tokens, greedy, prompt_of

from pdserve.core.errors import InternalError
from pdserve.core.types import FinishReason, OwnerId, SamplingParams, SequenceId, blocks_for
from pdserve.kvtransfer.pool.errors import PoolError
from pdserve.workers.engine.debt import Debt


def test_preemption_never_changes_the_output() -> None:
    harness = Harness(pool_blocks=9)
    prompts = {f"s{number}": prompt_of(20 + number, number) for number in range(4)}
    for number, (name, prompt) in enumerate(prompts.items()):
        harness.submit(name, prompt, greedy(50, seed=number))
    harness.run()
    assert harness.engine.stats().preemptions > 0
    for number, (name, prompt) in enumerate(prompts.items()):
        assert harness.tokens(name) == expected_tokens(prompt, greedy(50, seed=number))
        assert harness.text(name) == "".join(f"<{token}>" for token in harness.tokens(name))
    assert harness.pool.owners() == ()


def test_the_youngest_yields_and_returns_before_newcomers() -> None:
    harness = Harness(pool_blocks=6)
    for number, name in enumerate(("old", "middle", "young")):
        harness.submit(name, prompt_of(30, number), greedy(16))
        harness.step()
    harness.submit("new", prompt_of(16, 9), greedy(16))
    while not harness.engine.stats().preemptions:
        harness.step()
    states = {name: harness.pool.table(OwnerId(name)) for name in ("old", "middle", "young", "new")}
    assert [name for name, table in states.items() if not table] == ["young", "new"]
    owed = blocks_for(30 + len(harness.tokens("young")))
    assert harness.engine.stats().preempted_blocks == owed
    harness.run()
    assert harness.engine.stats().preempted_blocks == 0
    order = [item.sequence_id for step in harness.steps for item in step.items if item.finish_reason]
    assert order == ["old", "middle", "young", "new"]
    assert harness.engine.stats().preemptions <= 2


def test_preemptions_change_no_token() -> None:
    harness = Harness(pool_blocks=6)
    for number, name in enumerate(("old", "middle", "young")):
        harness.submit(name, prompt_of(30, number), greedy(40))
    harness.run()
    assert harness.engine.stats().preemptions > 0
    for number, name in enumerate(("old", "middle", "young")):
        assert harness.tokens(name) == expected_tokens(prompt_of(30, number), greedy(40))


def owed(name: str, prompt_tokens: int = 30, max_tokens: int = 40, headroom_tokens: int = 4) -> Debt:
    return Debt(OwnerId(f"promise/{name}"), prompt_tokens, max_tokens, headroom_tokens, choices=1)


def test_what_a_preempted_sequence_is_owed_is_booked_before_its_blocks_are_anybodys() -> None:
    """A newcomer who asks in the moment of the preemption is not promised them."""
    harness = Harness(pool_blocks=6)
    pool = harness.pool
    for number, name in enumerate(("old", "middle", "young")):
        debt = owed(name)
        assert pool.promise(debt.owner, 1)
        harness.submit(name, prompt_of(30, number), greedy(40), debt=debt)
    newcomers: list[bool] = []
    pool.add_free_listener(lambda: newcomers.append(pool.promise(OwnerId("new"), 2)))
    while not harness.engine.stats().preemptions:
        harness.step()
    assert newcomers == [False], "asked in the engine's thread, as its blocks came free"
    sampled = len(harness.tokens("young"))
    assert pool.promised(OwnerId("promise/young")) == owed("young").blocks(sampled) > 2
    harness.run()


def test_a_preemption_counts_tokens_that_are_held_back() -> None:
    """Their KV is computed again too, so they are owed room."""
    harness = Harness(pool_blocks=6)
    for number, name in enumerate(("old", "middle", "young")):
        expected = expected_tokens(prompt_of(30, number), greedy(40))
        never = "".join(f"<{token}>" for token in expected) + "!"
        params = SamplingParams(max_tokens=40, ignore_eos=True, stop=(never,))
        harness.submit(name, prompt_of(30, number), params, debt=owed(name, headroom_tokens=17))
    while not harness.engine.stats().preemptions:
        harness.step()
    names = ("old", "middle", "young")
    (yielded,) = [name for name in names if harness.pool.promised(OwnerId(f"promise/{name}"))]
    emitted = len(harness.tokens(yielded))
    debt = owed(yielded, headroom_tokens=17)  # a second token takes a block more
    assert harness.pool.promised(debt.owner) > debt.blocks(emitted)
    harness.run()
    for number, name in enumerate(("old", "middle", "young")):
        assert harness.tokens(name) == expected_tokens(prompt_of(30, number), greedy(40))


def test_the_oldest_is_never_preempted() -> None:
    harness = Harness(pool_blocks=8, max_sequences=4)
    for number in range(4):
        harness.submit(f"s{number}", prompt_of(17, number), greedy(80))
    while not harness.items("s0") or harness.last("s0").finish_reason is None:
        harness.step()
    computed = [item.num_computed for item in harness.items("s0")]
    assert computed == sorted(computed)
    assert harness.engine.stats().preemptions > 0


def test_a_prefill_is_never_preempted() -> None:
    harness = Harness(pool_blocks=6, chunk_tokens=8, role_weight=0.0)
    harness.submit("decode", prompt_of(30), greedy(20))
    for _ in range(4):
        harness.step()
    harness.submit("prefill", prompt_of(64, 1), None)  # the youngest, with the last four blocks
    harness.step()
    assert len(harness.pool.table(OwnerId("prefill"))) == 4
    while not harness.engine.stats().preemptions:
        harness.step()
    assert harness.pool.table(OwnerId("decode")) == ()
    while harness.last("prefill").finish_reason is None:
        harness.step()
    harness.pool.release(OwnerId("prefill"))
    harness.run()
    assert harness.tokens("decode") == expected_tokens(prompt_of(30), greedy(20))


def test_who_waits_for_memory_stops_no_running_one_and_lets_no_one_pass() -> None:
    harness = Harness(pool_blocks=6)
    harness.submit("running", prompt_of(30), greedy(20))
    harness.step()
    harness.submit("big", prompt_of(80, 1), greedy(1))
    harness.submit("small", prompt_of(8, 2), greedy(1))
    while harness.last("running").finish_reason is None:
        harness.step()
        assert not harness.pool.table(OwnerId("small"))
    harness.run()
    order = [item.sequence_id for step in harness.steps for item in step.items if item.finish_reason]
    assert order.index("running") == 0
    assert harness.tokens("running") == expected_tokens(prompt_of(30), greedy(20))


def test_a_committed_handoff_passes_who_waits_for_the_memory_that_it_holds() -> None:
    harness = Harness(pool_blocks=6)
    committed = harness.commit("committed", prompt_of(60), greedy(5))
    harness.submit("big", prompt_of(80, 1), greedy(1))
    harness.step()
    harness.engine.submit(committed)
    harness.run()
    assert harness.tokens("committed") == expected_tokens(prompt_of(60), greedy(5))
    assert harness.tokens("big") == expected_tokens(prompt_of(80, 1), greedy(1))


def test_a_preempted_handoff_is_recomputed_here() -> None:
    harness = Harness(pool_blocks=6)
    harness.submit("old", prompt_of(30), greedy(40))
    harness.step()
    prompt = prompt_of(44, 1)
    harness.engine.submit(harness.commit("handoff", prompt, greedy(30)))
    harness.run()
    assert harness.engine.stats().preemptions > 0
    assert harness.tokens("handoff") == expected_tokens(prompt, greedy(30))
    assert harness.last("handoff").cached_tokens == 0
    assert harness.tokens("old") == expected_tokens(prompt_of(30), greedy(40))


def test_memory_of_others_is_waited_for() -> None:
    harness = Harness(pool_blocks=4)
    other = OwnerId("other")
    harness.pool.allocate(other, 3)
    harness.submit("s", prompt_of(20), greedy(5))
    for _ in range(3):
        harness.step()
        assert harness.engine.is_stalled
    assert harness.items("s") == []
    harness.pool.release(other)
    harness.run()
    assert harness.tokens("s") == expected_tokens(prompt_of(20), greedy(5))


def abort_and_check(harness: Harness, name: str) -> None:
    harness.engine.abort(SequenceId(name))
    said = len(harness.tokens(name))
    harness.step()
    assert harness.last(name).finish_reason is FinishReason.ABORT
    assert len(harness.tokens(name)) == said
    assert harness.pool.table(OwnerId(name)) == ()
    harness.engine.abort(SequenceId(name))  # not live any more: nothing
    assert all(item.sequence_id != name for item in harness.step().items)


def test_abort_while_waiting_for_a_slot_leaves_nothing() -> None:
    harness = Harness(max_sequences=1)
    harness.submit("running", prompt_of(20), greedy(30))
    harness.submit("s", prompt_of(20, 1), greedy(3))
    harness.step()
    abort_and_check(harness, "s")


def test_abort_of_a_waiting_committed_handoff_frees_its_blocks() -> None:
    harness = Harness(max_sequences=1)
    harness.submit("running", prompt_of(20), greedy(30))
    harness.step()
    harness.engine.submit(harness.commit("s", prompt_of(40), greedy(3)))
    harness.step()
    abort_and_check(harness, "s")


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_abort_while_prefilling_or_decoding_leaves_nothing(steps: int) -> None:
    harness = Harness()
    harness.submit("s", prompt_of(60), greedy(30))
    for _ in range(steps):
        harness.step()
    abort_and_check(harness, "s")
    assert harness.pool.owners() == ()


def test_abort_while_preempted_leaves_nothing() -> None:
    harness = Harness(pool_blocks=5)
    harness.submit("old", prompt_of(30), greedy(40))
    harness.submit("s", prompt_of(30, 1), greedy(40))
    while not harness.engine.stats().preemptions:
        harness.step()
    assert harness.tokens("s")
    abort_and_check(harness, "s")
    harness.run()
    assert harness.tokens("old") == expected_tokens(prompt_of(30), greedy(40))


def test_abort_of_a_prefill_leaves_the_table_to_its_submitter() -> None:
    harness = Harness(chunk_tokens=16)
    harness.submit("p", prompt_of(60), None)
    harness.step()
    harness.engine.abort(SequenceId("p"))
    harness.step()
    assert harness.last("p").finish_reason is FinishReason.ABORT
    assert len(harness.pool.table(OwnerId("p"))) == 4


def test_a_failing_step_fails_its_batch_and_nothing_else() -> None:
    harness = Harness(max_sequences=2)
    for number, name in enumerate(("a", "b", "c")):
        harness.submit(name, prompt_of(20, number), greedy(5))
    harness.submit("p", prompt_of(20, 4), None)
    harness.step()
    harness.runner.fail_next = ValueError("a broken kernel")
    harness.step()
    for name in ("a", "b"):
        error = harness.last(name).error
        assert isinstance(error, InternalError)
        assert "a broken kernel" in error.message
        assert isinstance(error.__cause__, ValueError)
        assert harness.pool.table(OwnerId(name)) == ()
    harness.run()
    assert harness.tokens("c") == expected_tokens(prompt_of(20, 2), greedy(5))
    assert harness.last("p").finish_reason is FinishReason.LENGTH


def test_a_failing_prefill_leaves_the_table_to_its_submitter() -> None:
    harness = Harness()
    harness.submit("p", prompt_of(20), None)
    harness.runner.fail_next = RuntimeError("out of registers")
    harness.run()
    assert isinstance(harness.last("p").error, InternalError)
    assert len(harness.pool.table(OwnerId("p"))) == 2


def test_a_sequence_whose_table_was_stolen_fails_alone() -> None:
    harness = Harness()
    harness.submit("victim", prompt_of(30), greedy(20))
    harness.submit("other", prompt_of(30, 1), greedy(20))
    harness.step()
    harness.pool.release(OwnerId("victim"))  # a defect of somebody else
    for _ in range(40):
        harness.steps.append(harness.engine.step())
    assert isinstance(harness.last("victim").error, PoolError)
    assert harness.tokens("other") == expected_tokens(prompt_of(30, 1), greedy(20))
    harness.engine.check_integrity()
