"""What an engine with room enough says, and when."""

import pytest
from engine_harness import EOS, ROOT, Harness, expected_tokens, greedy, make_spec, prompt_of

from pdserve.core.errors import ContextTooLong, InternalError, InvalidRequest
from pdserve.core.types import FinishReason, OwnerId, SamplingParams, SequenceId
from pdserve.kvtransfer.names import chain

LENGTHS = (1, 15, 16, 17, 32, 50, 100)


def test_continuous_batching_equals_one_at_a_time() -> None:
    harness = Harness()
    for number, length in enumerate(LENGTHS):
        harness.submit(f"s{number}", prompt_of(length, number), greedy(20 + number, seed=number))
        harness.step()
    harness.run()
    for number, length in enumerate(LENGTHS):
        expected = expected_tokens(prompt_of(length, number), greedy(20 + number, seed=number))
        assert harness.tokens(f"s{number}") == expected
        assert harness.last(f"s{number}").finish_reason is FinishReason.LENGTH
    assert harness.pool.owners() == ()


@pytest.mark.parametrize(("token_budget", "chunk_tokens"), [(1, 1), (7, 3), (16, 16), (40, 33), (512, 256)])
def test_chunk_sizes_do_not_change_the_output(token_budget: int, chunk_tokens: int) -> None:
    harness = Harness(token_budget=token_budget, chunk_tokens=chunk_tokens)
    for number, length in enumerate(LENGTHS):
        harness.submit(f"s{number}", prompt_of(length, number), greedy(9))
    harness.run()
    for number, length in enumerate(LENGTHS):
        assert harness.tokens(f"s{number}") == expected_tokens(prompt_of(length, number), greedy(9))
    sizes = [[len(chunk.token_ids) for chunk in batch.chunks] for batch in harness.runner.batches]
    assert max(map(sum, sizes)) <= token_budget
    assert max(map(max, sizes)) <= chunk_tokens


def test_a_second_pass_reuses_the_prefix_also_of_generated_blocks() -> None:
    harness = Harness()
    prompt = prompt_of(40)
    harness.submit("first", prompt, greedy(30))
    harness.run()
    assert harness.last("first").cached_tokens == 0
    longer = prompt + harness.tokens("first")
    harness.submit("second", longer, greedy(5))
    harness.run()
    assert harness.last("second").cached_tokens == 64  # 69 positions were computed, 4 blocks are full
    assert harness.tokens("second") == expected_tokens(longer, greedy(5))


def test_the_last_position_of_a_sampling_sequence_is_never_a_hit() -> None:
    harness = Harness()
    for name in ("first", "second"):
        harness.submit(name, prompt_of(48), greedy(3))
        harness.run()
    assert harness.last("second").cached_tokens == 32
    assert harness.tokens("first") == harness.tokens("second")


def test_a_running_sequence_shares_its_full_blocks() -> None:
    harness = Harness()
    prompt = prompt_of(64)
    harness.submit("first", prompt, greedy(40))
    for _ in range(4):
        harness.step()
    harness.submit("second", prompt, greedy(40, seed=1))
    harness.step()
    tables = [harness.pool.table(OwnerId(name)) for name in ("first", "second")]
    assert tables[0][:3] == tables[1][:3]
    assert tables[0][3] != tables[1][3]
    harness.run()
    assert harness.tokens("second") == expected_tokens(prompt, greedy(40, seed=1))


def test_eos_ends_with_stop_and_has_no_text() -> None:
    params = next(
        params
        for seed in range(200)
        if 2 <= len(expected_tokens(prompt_of(20), params := greedy(50, seed, ignore_eos=False))) < 50
    )
    harness = Harness()
    harness.submit("s", prompt_of(20), params)
    harness.run()
    tokens = harness.tokens("s")
    assert tokens == expected_tokens(prompt_of(20), params)
    assert tokens[-1] == EOS
    assert harness.text("s") == "".join(f"<{token}>" for token in tokens[:-1])
    assert harness.last("s").finish_reason is FinishReason.STOP


def test_ignored_eos_goes_on_to_the_length() -> None:
    params = next(
        p for seed in range(200) if EOS in expected_tokens(prompt_of(20), p := greedy(30, seed))[:-1]
    )
    harness = Harness()
    harness.submit("s", prompt_of(20), params)
    harness.run()
    assert len(harness.tokens("s")) == 30
    assert harness.text("s") == "".join(f"<{token}>" for token in harness.tokens("s"))


@pytest.mark.parametrize("prior", [1, 7, 19])
def test_a_resume_goes_on_where_it_was(prior: int) -> None:
    prompt, params = prompt_of(30), greedy(20, seed=4)
    whole = expected_tokens(prompt, params)
    harness = Harness()
    harness.submit("s", prompt + whole[:prior], params, prior_tokens=prior)
    harness.run()
    assert harness.tokens("s") == whole[prior:]
    assert harness.items("s")[-1].first_index == 19
    held_before = f"<{whole[prior - 1]}>"  # the earlier run had not shown it yet
    assert harness.text("s") == held_before + "".join(f"<{token}>" for token in whole[prior:])


def test_a_committed_handoff_runs_one_position_and_samples() -> None:
    prompt, params = prompt_of(50), greedy(20, seed=2)
    harness = Harness()
    harness.engine.submit(harness.commit("s", prompt, params))
    harness.step()
    assert [len(chunk.token_ids) for chunk in harness.runner.batches[0].chunks] == [1]
    assert len(harness.tokens("s")) == 1
    harness.run()
    assert harness.tokens("s") == expected_tokens(prompt, params)
    assert harness.last("s").cached_tokens == 0
    assert harness.pool.match(chain(ROOT, prompt)) == 3  # its full blocks can be found from now on


def test_a_table_that_is_too_short_fails_its_sequence_only() -> None:
    harness = Harness()
    harness.submit("good", prompt_of(20), greedy(3))
    harness.pool.allocate(OwnerId("bad"), 1)
    harness.submit("bad", prompt_of(20), greedy(3), num_computed=19)
    harness.run()
    assert isinstance(harness.last("bad").error, InternalError)
    assert harness.tokens("good") == expected_tokens(prompt_of(20), greedy(3))
    assert harness.pool.owners() == ()


def test_a_table_that_nobody_announced_fails_its_sequence() -> None:
    harness = Harness()
    harness.pool.allocate(OwnerId("bad"), 1)
    harness.submit("bad", prompt_of(20), greedy(3))
    harness.run()
    assert isinstance(harness.last("bad").error, InternalError)
    assert harness.pool.owners() == ()


def test_prefill_only_computes_every_position_and_leaves_its_table() -> None:
    harness = Harness(chunk_tokens=16)
    prompt = prompt_of(50)
    harness.submit("p", prompt, None)
    harness.run()
    assert [item.num_computed for item in harness.items("p")] == [16, 32, 48, 50]
    assert harness.last("p").finish_reason is FinishReason.LENGTH
    assert harness.tokens("p") == []
    table = harness.pool.table(OwnerId("p"))
    written = [harness.runner.kv[block][offset] for block in table for offset in range(16)]
    assert written[:50] == prompt
    harness.pool.release(OwnerId("p"))
    assert harness.pool.counts().cached == 3


def test_a_prefill_that_is_cached_as_a_whole_runs_nothing() -> None:
    harness = Harness()
    for name in ("first", "second"):
        harness.submit(name, prompt_of(48), None)
        harness.run()
    batches = len(harness.runner.batches)
    last = harness.last("second")
    assert (last.num_computed, last.cached_tokens, last.finish_reason) == (48, 48, FinishReason.LENGTH)
    assert last.started_at == last.prefill_ended_at is not None
    assert harness.pool.table(OwnerId("second")) == harness.pool.table(OwnerId("first"))
    assert batches == 2  # both are of the first pass: 32 and 16 tokens


def test_blocks_are_named_only_after_the_step_that_filled_them() -> None:
    harness = Harness(chunk_tokens=10)
    names = chain(ROOT, prompt_of(40))
    harness.submit("s", prompt_of(40), None)
    found = []
    while harness.engine.has_work:
        harness.step()
        found.append(harness.pool.match(names))
    assert found == [0, 1, 1, 2]


def test_times_are_those_of_the_steps() -> None:
    harness = Harness(chunk_tokens=16)  # each step reads the clock twice: odd at its start, even at its end
    harness.submit("s", prompt_of(40), greedy(2))
    harness.submit("p", prompt_of(16, 1), None)
    harness.run()
    last = harness.last("s")
    assert (last.started_at, last.prefill_ended_at, last.first_token_at) == (1.0, 5.0, 6.0)
    last = harness.last("p")
    assert (last.started_at, last.prefill_ended_at, last.first_token_at) == (1.0, 2.0, None)


def test_what_can_never_fit_is_refused_naming_both_numbers() -> None:
    harness = Harness(pool_blocks=4, max_positions=100)
    harness.submit("pool", prompt_of(60), greedy(6))
    harness.submit("model", prompt_of(60), greedy(42))
    harness.submit("fits", prompt_of(60), greedy(5))
    harness.run()
    for name, numbers in (("pool", ("5 blocks", "has 4")), ("model", ("101 positions", "has 100"))):
        error = harness.last(name).error
        assert isinstance(error, ContextTooLong)
        assert all(number in error.message for number in numbers)
    assert len(harness.tokens("fits")) == 5


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"prompt": []}, InvalidRequest),
        ({"prompt": [1, 2], "num_computed": 2}, InternalError),
        ({"prompt": [1, 2, 3], "prior_tokens": 3}, InternalError),
        ({"prompt": [1] * 6, "prior_tokens": 5}, InvalidRequest),
    ],
)
def test_a_spec_that_makes_no_sense_is_refused(fields: dict[str, object], kind: type[Exception]) -> None:
    harness = Harness()
    harness.submit("s", params=greedy(5), **fields)  # type: ignore[arg-type]
    outputs = harness.step()
    assert [type(item.error) for item in outputs.items] == [kind]
    assert harness.runner.batches == []


def test_one_id_twice_ends_both() -> None:
    harness = Harness()
    harness.submit("s", prompt_of(20), greedy(5))
    harness.step()
    harness.submit("s", prompt_of(20), greedy(5))
    harness.run()
    assert isinstance(harness.last("s").error, InternalError)
    assert len(harness.items("s")) == 2
    assert harness.pool.owners() == ()


def test_one_owner_twice_leaves_the_first_alone() -> None:
    harness = Harness()
    harness.submit("s", prompt_of(20), greedy(5))
    harness.step()
    spec = make_spec("s", prompt_of(20), greedy(5))
    harness.engine.submit(
        type(spec)(SequenceId("t"), spec.owner, spec.token_ids, spec.chain, spec.namespace, spec.sampling)
    )
    harness.run()
    assert isinstance(harness.last("t").error, InternalError)
    assert harness.tokens("s") == expected_tokens(prompt_of(20), greedy(5))


def test_the_performance_model_sees_every_step() -> None:
    harness = Harness()
    before = harness.engine.perf_snapshot()
    harness.submit("s", prompt_of(40), SamplingParams(max_tokens=5))
    harness.run()
    after = harness.engine.perf_snapshot()
    assert after["prefill/token_seconds"] != before["prefill/token_seconds"]
    assert after["decode/sequence_seconds"] != before["decode/sequence_seconds"]


def test_stats_count_what_is_queued() -> None:
    harness = Harness(max_sequences=1)
    harness.submit("a", prompt_of(50), greedy(2))
    harness.submit("b", prompt_of(20, 1), greedy(2))
    harness.step()
    stats = harness.engine.stats()
    assert (stats.progress, stats.running, stats.waiting) == (1, 1, 1)
    assert stats.queued_prefill_tokens == (50 - 32) + 20
    assert stats.context_tokens == 32
