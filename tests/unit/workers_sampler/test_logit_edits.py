"""Every edit changes the logits that it names, by what it says, and no others."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MinPLogitsWarper, RepetitionPenaltyLogitsProcessor

from pdserve.core.errors import InternalError
from pdserve.core.types import SamplingParams
from pdserve.workers.engine.logit_edits import edit_logits
from pdserve.workers.engine.logit_rules import LogitEdits, LogitRules
from pdserve.workers.engine.runner import ChunkSpec, Sampled
from pdserve.workers.engine.sampler import SampleRequest, sample
from pdserve.workers.engine.torch_runner import sample_chunks

VOCABULARY = 61
EOS = frozenset({0, 60})
FEW = settings(max_examples=40, deadline=None)
TOKENS = st.lists(st.integers(0, VOCABULARY - 1), max_size=30)
PENALTIES = st.fixed_dictionaries(
    {
        "repetition_penalty": st.sampled_from([1.0, 0.5, 1.3, 2.0]),
        "presence_penalty": st.sampled_from([0.0, -1.5, 0.75]),
        "frequency_penalty": st.sampled_from([0.0, -0.25, 0.5]),
        "logit_bias": st.dictionaries(
            st.integers(0, VOCABULARY - 1), st.sampled_from([-99.0, -0.5, 3.25]), max_size=4
        ).map(lambda biases: tuple(biases.items())),
    }
)


def row(seed: int = 0) -> torch.Tensor:
    return torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3


class OneMask:
    """A matcher that always allows the same tokens."""

    is_complete = False

    def __init__(self, allowed: set[int]) -> None:
        bits = np.zeros(64, dtype=np.uint8)
        bits[list(allowed)] = 1
        self._bits = np.packbits(bits, bitorder="little")

    def take(self, token: int) -> None:
        pass

    def allowed(self) -> np.ndarray:
        return self._bits


def rules(params: SamplingParams, prompt: list[int], completion: list[int], **more: OneMask) -> LogitRules:
    return LogitRules(params, prompt, completion, EOS, **more)


def edited(logits: torch.Tensor, edits: LogitEdits | None) -> torch.Tensor:
    batch = logits.clone().unsqueeze(0)
    edit_logits(batch, {} if edits is None else {0: edits})
    return batch[0]


def plain_reference(
    logits: torch.Tensor, params: SamplingParams, prompt: list[int], completion: list[int]
) -> list[float]:
    """Token by token, as the definitions say."""
    values = []
    for token, logit in enumerate(logits.tolist()):
        value = logit + dict(params.logit_bias).get(token, 0.0)
        if token in prompt or token in completion:
            value = value / params.repetition_penalty if value > 0 else value * params.repetition_penalty
        value -= params.frequency_penalty * completion.count(token)
        value -= params.presence_penalty * (token in completion)
        values.append(value)
    return values


@FEW
@given(PENALTIES, TOKENS, TOKENS)
def test_penalties_and_bias_are_what_the_definitions_say(
    fields: dict[str, object], prompt: list[int], completion: list[int]
) -> None:
    params = SamplingParams(**fields)  # type: ignore[arg-type]
    result = edited(row(), rules(params, prompt, completion).edits())
    assert result.tolist() == pytest.approx(plain_reference(row(), params, prompt, completion), rel=1e-6)
    named = {*dict(params.logit_bias), *completion, *(prompt if params.repetition_penalty != 1.0 else ())}
    others = [token for token in range(VOCABULARY) if token not in named]
    assert torch.equal(result[others], row()[others])


@FEW
@given(TOKENS.filter(bool), TOKENS, st.floats(0.1, 5))
def test_repetition_penalty_is_that_of_transformers(
    prompt: list[int], completion: list[int], penalty: float
) -> None:
    params = SamplingParams(repetition_penalty=penalty)
    ids = torch.tensor([prompt + completion])
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(ids, row().unsqueeze(0))[0]
    torch.testing.assert_close(edited(row(), rules(params, prompt, completion).edits()), theirs)


@pytest.mark.parametrize("bias", [0.5, -3.0, 99.0])
def test_a_bias_adds_exactly(bias: float) -> None:
    result = edited(row(), rules(SamplingParams(logit_bias=((7, bias),)), [], []).edits())
    expected = row()
    expected[7] += bias
    assert torch.equal(result, expected)


@FEW
@given(TOKENS, st.integers(0, 29))
def test_a_resume_has_the_rules_of_the_sequence_that_went_on(tokens: list[int], cut: int) -> None:
    params = SamplingParams(repetition_penalty=1.2, frequency_penalty=0.3, min_tokens=9)
    went_on = rules(params, [1, 2], tokens[:cut])
    for token in tokens[cut:]:
        went_on.take(token)
    resumed = rules(params, [1, 2], tokens)
    assert torch.equal(edited(row(), went_on.edits()), edited(row(), resumed.edits()))


def test_token_counts_survive_their_growth() -> None:
    params = SamplingParams(frequency_penalty=1.0)
    state = LogitRules(params, [], [token % 300 for token in range(900)], frozenset())
    logits = torch.zeros(1, 300)
    edits = state.edits()
    assert edits is not None
    edit_logits(logits, {0: edits})
    assert torch.equal(logits, torch.full((1, 300), -3.0))


def chunk(params: SamplingParams, position: int, state: LogitRules | None) -> ChunkSpec:
    return ChunkSpec((1,), position - 1, (), params, None if state is None else state.edits())


def draws(logits: torch.Tensor, params: SamplingParams, state: LogitRules, count: int) -> set[int]:
    chunks = [chunk(params, position, state) for position in range(1, count + 1)]
    return {sampled.token for sampled in sample_chunks(logits.repeat(count, 1), chunks)}


@pytest.mark.parametrize("temperature", [0.0, 1.0, 50.0])
def test_a_banned_token_never_appears_however_likely(temperature: float) -> None:
    logits = row()
    logits[[3, 9]] = torch.tensor([500.0, 400.0])
    params = SamplingParams(temperature=temperature, logit_bias=((3, -100.0), (9, -100.0)))
    assert not draws(logits, params, rules(params, [], []), 300) & {3, 9}


def test_bans_that_leave_nothing_are_void() -> None:
    params = SamplingParams(logit_bias=tuple((token, -100.0) for token in range(VOCABULARY)))
    assert torch.equal(edited(row(), rules(params, [], []).edits()), row())


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_min_tokens_bans_the_ends_until_then_and_not_after(ignore_eos: bool) -> None:
    params = SamplingParams(min_tokens=3, stop_token_ids=(5,), ignore_eos=ignore_eos)
    state = rules(params, [1], [])
    ends = {5} if ignore_eos else {5, *EOS}
    for _ in range(3):
        banned = (edited(row(), state.edits()) == -torch.inf).nonzero().flatten().tolist()
        assert set(banned) == ends
        state.take(7)
    assert state.edits() is None


def test_a_constraint_leaves_what_it_allows() -> None:
    allowed = {2, 8, 31, 60}
    state = rules(SamplingParams(), [], [], matcher=OneMask(allowed))
    result = edited(row(), state.edits())
    assert set((result > -torch.inf).nonzero().flatten().tolist()) == allowed
    assert torch.equal(result[sorted(allowed)], row()[sorted(allowed)])


def test_a_ban_does_not_take_the_last_token_of_a_constraint() -> None:
    params = SamplingParams(min_tokens=5, logit_bias=((4, -100.0),))
    only_banned = rules(params, [], [], matcher=OneMask({0, 4}))
    other_left = rules(params, [], [], matcher=OneMask({0, 4, 11}))
    batch = torch.stack([row(), row()])
    edits = {number: state.edits() for number, state in enumerate((only_banned, other_left))}
    edit_logits(batch, edits)  # type: ignore[arg-type]
    assert [set((line > -torch.inf).nonzero().flatten().tolist()) for line in batch] == [{0, 4}, {11}]


def test_ignore_eos_goes_on_while_a_constraint_can() -> None:
    params = SamplingParams(ignore_eos=True)
    result = edited(row(), rules(params, [], [], matcher=OneMask({0, 4})).edits())
    assert (result > -torch.inf).nonzero().flatten().tolist() == [4]


def test_ids_out_of_the_vocabulary_are_left_out() -> None:
    params = SamplingParams(logit_bias=((VOCABULARY, 5.0), (2, 1.0)), min_tokens=2, stop_token_ids=(999,))
    result = edited(row(), rules(params, [], []).edits())
    assert float(result[2]) == pytest.approx(float(row()[2]) + 1.0)


def test_no_penalty_makes_a_logit_infinite() -> None:
    logits = torch.full((VOCABULARY,), 1e38)
    params = SamplingParams(repetition_penalty=0.01)
    assert bool(edited(logits, rules(params, [1], []).edits()).isfinite().all())


def test_an_exclusion_does_not_hide_broken_logits() -> None:
    logits = row()
    logits[3] = torch.nan
    state = rules(SamplingParams(), [], [], matcher=OneMask({2}))
    with pytest.raises(InternalError, match=r"rows \[0\]"):
        edited(logits, state.edits())


MIXED = [
    SamplingParams(),
    SamplingParams(temperature=1.0, seed=1),
    SamplingParams(temperature=1.0, seed=2, repetition_penalty=1.4, logprobs=2),
    SamplingParams(presence_penalty=0.5, frequency_penalty=0.2, logit_bias=((8, 2.0), (3, -100.0))),
    SamplingParams(temperature=0.8, min_p=0.1, seed=3, min_tokens=40, logprobs=0),
    SamplingParams(temperature=1.5, top_p=0.8, top_k=9, min_p=0.02, seed=4, logprobs=5),
]


def test_a_row_does_not_depend_on_who_else_is_in_the_batch() -> None:
    states = [rules(p, [1, 2, 3], [5, 5, 8]) if LogitRules.needed(p) else None for p in MIXED]
    chunks = [chunk(p, 7 + i, state) for i, (p, state) in enumerate(zip(MIXED, states, strict=True))] * 3
    logits = torch.stack([row(i) for i in range(len(chunks))])
    together = sample_chunks(logits.clone(), chunks)
    alone = [sample_chunks(logits[i : i + 1].clone(), [chunks[i]])[0] for i in range(len(chunks))]
    backwards = sample_chunks(logits.flip(0), chunks[::-1])[::-1]
    assert together == alone == backwards


def test_rows_without_edits_are_sampled_from_their_own_logits() -> None:
    """Neighbours with edits change nothing for them."""
    logits = torch.stack([row(i) for i in range(4)])
    biased = SamplingParams(logit_bias=((1, 90.0),))
    chunks = [chunk(SamplingParams(), 3, None), chunk(biased, 3, rules(biased, [], []))] * 2
    tokens = sample_chunks(logits.clone(), chunks)
    assert tokens == [
        Sampled(int(logits[0].argmax())),
        Sampled(1),
        Sampled(int(logits[2].argmax())),
        Sampled(1),
    ]


@pytest.mark.parametrize("min_p", [0.02, 0.2, 1.0])
def test_min_p_leaves_what_transformers_leaves(min_p: float) -> None:
    logits = row(9) / 2
    theirs = MinPLogitsWarper(min_p)(None, logits.unsqueeze(0))[0]
    kept = set((theirs > -torch.inf).nonzero().flatten().tolist())
    requests = [SampleRequest(SamplingParams(temperature=1.0, min_p=min_p), 3, i) for i in range(6000)]
    counts = torch.bincount(torch.tensor(sample(logits.expand(6000, -1), requests)), minlength=VOCABULARY)
    expected = torch.softmax(theirs.double(), 0)
    assert set(counts.nonzero().flatten().tolist()) <= kept
    deviation = (counts / 6000 - expected).abs() / (expected * (1 - expected) / 6000).sqrt().clamp(min=1e-3)
    assert float(deviation.max()) < 5


def test_min_p_counts_after_the_temperature() -> None:
    logits = torch.full((VOCABULARY,), -50.0)
    logits[:2] = torch.tensor([0.0, -2.0])
    for temperature, kept in ((1.0, {0}), (2.0, {0, 1})):
        params = SamplingParams(temperature=temperature, min_p=math.exp(-1.5))
        requests = [SampleRequest(params, 1, position) for position in range(400)]
        assert set(sample(logits.expand(400, -1), requests)) == kept
