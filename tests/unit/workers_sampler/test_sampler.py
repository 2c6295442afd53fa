"""Sampling is a pure function of (row, parameters, seed, position), and it samples the right distribution."""

import math

import pytest
import torch

from pdserve.core.errors import InternalError
from pdserve.core.seed import derive_seed, mix64, noise_key
from pdserve.core.types import SamplingParams
from pdserve.workers.engine.sampler import SampleRequest, gumbel_noise, sample

VOCABULARY = 97
DRAWS = 20_000


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def row(seed: int = 0, size: int = VOCABULARY) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 2


def random(position: int = 0, seed: int = 1, **params: float) -> SampleRequest:
    settings = {"temperature": 1.0} | params
    return SampleRequest(SamplingParams(**settings), seed, position)  # type: ignore[arg-type]


def draw_many(logits: torch.Tensor, draws: int = DRAWS, seed: int = 1, **params: float) -> torch.Tensor:
    requests = [random(position, seed, **params) for position in range(draws)]
    tokens = sample(logits.expand(draws, -1), requests)
    return torch.bincount(torch.tensor(tokens), minlength=logits.shape[0]).double()


def chi_square_is_plausible(counts: torch.Tensor, probabilities: torch.Tensor) -> bool:
    """Pearson's statistic under its mean + 5 standard deviations; rare cells are pooled."""
    expected = probabilities.double() * counts.sum()
    common = expected >= 5
    observed = torch.cat([counts[common], counts[~common].sum().reshape(1)])
    wanted = torch.cat([expected[common], expected[~common].sum().reshape(1)])
    kept = wanted > 0
    statistic = float(((observed[kept] - wanted[kept]) ** 2 / wanted[kept]).sum())
    freedom = int(kept.sum()) - 1
    return statistic <= freedom + 5 * math.sqrt(2 * freedom)


MIXED = [
    SampleRequest(SamplingParams(), 0, 3),
    random(4, 11),
    random(5, 12, top_k=5),
    random(6, 13, top_p=0.7),
    random(7, 14, top_k=20, top_p=0.5, temperature=1.7),
    random(8, 15, temperature=0.3),
    random(9, 16, top_k=1),
    random(10, 17, top_k=10_000),
    random(11, 18, top_p=0.999999),
] * 3


def test_seed_reproducibility() -> None:
    logits = torch.stack([row(i) for i in range(len(MIXED))])
    assert sample(logits, MIXED) == sample(logits.clone(), MIXED)


def test_a_row_does_not_depend_on_its_batch() -> None:
    logits = torch.stack([row(i) for i in range(len(MIXED))])
    together = sample(logits, MIXED)
    alone = [sample(logits[i : i + 1], [request])[0] for i, request in enumerate(MIXED)]
    backwards = sample(logits.flip(0), MIXED[::-1])[::-1]
    assert together == alone == backwards


def test_a_row_does_not_depend_on_its_batch_at_a_real_vocabulary() -> None:
    requests = MIXED[:9]
    logits = torch.stack([row(i, 49_152) for i in range(len(requests))])
    alone = [sample(logits[i : i + 1], [request])[0] for i, request in enumerate(requests)]
    assert sample(logits, requests) == alone


def test_the_logits_are_left_alone() -> None:
    logits = torch.stack([row(i) for i in range(len(MIXED))])
    before = logits.clone()
    sample(logits, MIXED)
    assert torch.equal(logits, before)


def test_temperature_zero_determinism() -> None:
    logits = row()
    requests = [SampleRequest(SamplingParams(temperature=0.0), seed, seed * 7) for seed in range(50)]
    assert set(sample(logits.expand(50, -1), requests)) == {int(logits.argmax())}


@pytest.mark.parametrize("size", [3, 64, 1000])
def test_greedy_ties_go_to_the_lowest_id(size: int) -> None:
    logits = torch.zeros(1, size)
    logits[0, [1, size - 1]] = 2.0
    assert sample(logits, [SampleRequest(SamplingParams(), 0, 0)]) == [1]


def test_top_k_of_one_is_greedy_even_among_ties() -> None:
    logits = torch.zeros(64, 8)
    requests = [random(position, top_k=1, temperature=5.0) for position in range(64)]
    assert sample(logits, requests) == [0] * 64


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_the_distribution_is_the_softmax(temperature: float) -> None:
    logits = row(3)
    counts = draw_many(logits, temperature=temperature)
    assert chi_square_is_plausible(counts, torch.softmax(logits.double() / temperature, 0))
    assert not chi_square_is_plausible(counts, torch.softmax(logits.double() / (temperature * 1.2), 0))


def test_top_k_samples_the_renormalised_top_k() -> None:
    logits = row(4)
    counts = draw_many(logits, top_k=10)
    kept = logits.topk(10).indices
    masked = torch.full_like(logits, -torch.inf).index_copy_(0, kept, logits[kept])
    assert int((counts > 0).sum()) <= 10
    assert chi_square_is_plausible(counts, torch.softmax(masked.double(), 0))


def test_top_k_keeps_exactly_k_of_equals_the_lowest_ids() -> None:
    counts = draw_many(torch.zeros(30), draws=2000, top_k=4)
    assert counts.nonzero().flatten().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("top_p", [0.05, 0.3, 0.8, 0.99])
def test_top_p_never_leaves_the_nucleus_and_fills_it(top_p: float) -> None:
    logits = row(5)
    probabilities = torch.softmax(logits.double(), 0)
    ordered = probabilities.sort(descending=True)
    before = ordered.values.cumsum(0) - ordered.values
    nucleus = ordered.indices[before < top_p]
    counts = draw_many(logits, top_p=top_p)
    inside = torch.zeros_like(probabilities).index_copy_(0, nucleus, probabilities[nucleus])
    assert float(counts.sum() - counts[nucleus].sum()) == 0
    assert chi_square_is_plausible(counts, inside / inside.sum())


def test_top_p_agrees_with_hugging_face_on_what_may_be_drawn() -> None:
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = row(6)
    scores = logits.unsqueeze(0)
    for warper in (TemperatureLogitsWarper(1.5), TopKLogitsWarper(40), TopPLogitsWarper(0.9)):
        scores = warper(None, scores)
    counts = draw_many(logits, temperature=1.5, top_k=40, top_p=0.9)
    assert chi_square_is_plausible(counts, torch.softmax(scores[0].double(), 0))
    assert not bool((counts[scores[0] == -torch.inf] > 0).any())


def test_a_tiny_top_p_is_greedy() -> None:
    logits = row(7)
    assert draw_many(logits, draws=500, top_p=1e-9)[int(logits.argmax())] == 500


def test_masked_tokens_are_never_drawn() -> None:
    logits = torch.full((VOCABULARY,), -torch.inf)
    logits[[3, 50]] = 0.0
    for params in ({}, {"top_k": 5}, {"top_p": 0.9}):
        assert set(draw_many(logits, draws=500, **params).nonzero().flatten().tolist()) == {3, 50}


def test_neighbouring_positions_and_seeds_are_uncorrelated() -> None:
    ids = torch.arange(20_000).unsqueeze(0)
    keys = [noise_key(seed, position) for seed in (0, 1, 2, 1 << 40) for position in (0, 1, 2)]
    signed = torch.tensor([[key - (1 << 64) if key >> 63 else key] for key in keys])
    correlation = torch.corrcoef(gumbel_noise(signed, ids)) - torch.eye(len(keys))
    assert float(correlation.abs().max()) < 5 / math.sqrt(ids.shape[1])


def test_the_noise_is_standard_gumbel_and_finite() -> None:
    noise = gumbel_noise(torch.tensor([[7]]), torch.arange(200_000).unsqueeze(0))
    assert bool(noise.isfinite().all())
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.02)
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, abs=0.04)


def test_the_noise_is_the_published_sequence_of_its_key() -> None:
    """Word t + 1 of SplitMix64 from the key, in plain integers, as any other device computes it."""
    key = noise_key(5, 9)
    words = [mix64(key + (token + 1) * 0x9E3779B97F4A7C15) for token in range(1000)]
    expected = [-math.log(-math.log(((word >> 12) + 0.5) * 2.0**-52)) for word in words]
    signed = key - (1 << 64) if key >> 63 else key
    noise = gumbel_noise(torch.tensor([[signed]]), torch.arange(1000).unsqueeze(0))
    assert noise[0].tolist() == pytest.approx(expected, rel=1e-12)


def test_mix64_is_splitmix64() -> None:
    """First outputs of the reference implementation from state 1234567."""
    gamma = 0x9E3779B97F4A7C15
    outputs = [mix64(1234567 + (i + 1) * gamma) for i in range(3)]
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_choice_zero_keeps_the_seed_and_others_differ() -> None:
    for seed in (0, 1, 42, (1 << 63) - 1):
        assert derive_seed(seed, 0) == seed
        derived = [derive_seed(seed, choice) for choice in range(1, 200)]
        assert len({seed, *derived}) == 200
        assert all(0 <= value < 1 << 63 for value in derived)


def test_no_rows_give_no_tokens() -> None:
    assert sample(torch.zeros(0, 5), []) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_logits_are_named(value: float) -> None:
    logits = torch.zeros(3, 5)
    logits[1, 2] = value
    with pytest.raises(InternalError, match=r"rows \[1\]"):
        sample(logits, [SampleRequest(SamplingParams(), 0, 0)] * 3)


def test_rows_and_requests_must_match() -> None:
    with pytest.raises(InternalError, match="2 rows of logits for 1"):
        sample(torch.zeros(2, 5), [SampleRequest(SamplingParams(), 0, 0)])


@pytest.mark.parametrize("temperature", [9e-6, 1e-300, 1e-308, 5e-324])
@pytest.mark.parametrize("cut", [{}, {"top_p": 0.9}, {"top_k": 3}, {"min_p": 0.1}])
def test_a_temperature_next_to_zero_is_greedy(temperature: float, cut: dict[str, float]) -> None:
    """Divided by it, logits would be infinite: one request must not break the step of a whole batch."""
    logits = torch.stack([row(1), row(2)])
    requests = [random(temperature=temperature, **cut), random(temperature=0.0)]
    assert sample(logits, requests) == logits.argmax(-1).tolist()
