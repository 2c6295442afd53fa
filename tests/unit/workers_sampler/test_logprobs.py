"""Logprobs are the log-softmax of what the model said, whatever was done to the logits for sampling."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.core.types import SamplingParams
from pdserve.workers.engine.logit_rules import LogitRules
from pdserve.workers.engine.logprobs import token_logprobs
from pdserve.workers.engine.runner import ChunkSpec
from pdserve.workers.engine.torch_runner import sample_chunks

VOCABULARY = 83
FEW = settings(max_examples=40, deadline=None)


def rows(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 4


@FEW
@given(
    st.integers(0, 1000), st.lists(st.tuples(st.integers(0, VOCABULARY - 1), st.integers(0, 20)), max_size=6)
)
def test_logprobs_are_the_log_softmax_and_ranks_count_what_is_likelier(
    seed: int, asks: list[tuple[int, int]]
) -> None:
    logits = rows(len(asks), seed)
    found = token_logprobs(logits, [token for token, _ in asks], [top for _, top in asks])
    for line, (token, top), report in zip(logits, asks, found, strict=True):
        expected = torch.log_softmax(line.double(), 0)
        order = sorted(range(VOCABULARY), key=lambda t: (-float(line[t]), t))
        assert report.token_id == token
        assert report.logprob == pytest.approx(float(expected[token]), abs=1e-9)
        assert report.rank == order.index(token) + 1
        assert [t for t, _ in report.top] == order[:top]
        assert [p for _, p in report.top] == pytest.approx(
            [float(expected[t]) for t in order[:top]], abs=1e-9
        )


def test_equal_logits_rank_by_id() -> None:
    logits = torch.zeros(1, VOCABULARY)
    logits[0, 40] = 1.0
    (report,) = token_logprobs(logits, [7], [5])
    assert [token for token, _ in report.top] == [40, 0, 1, 2, 3]
    assert report.rank == 9


def test_a_row_does_not_depend_on_its_batch() -> None:
    logits, tokens, tops = rows(9), [5, 1, 80, 3, 3, 9, 60, 2, 0], [0, 3, 20, 1, 7, 0, 5, 2, 20]
    together = token_logprobs(logits, tokens, tops)
    alone = [token_logprobs(logits[i : i + 1], tokens[i : i + 1], tops[i : i + 1])[0] for i in range(9)]
    assert together == alone


def test_more_than_the_vocabulary_is_the_vocabulary() -> None:
    (report,) = token_logprobs(torch.randn(1, 4), [2], [20])
    assert len(report.top) == 4


def test_they_are_taken_before_bias_penalties_and_temperature() -> None:
    params = SamplingParams(
        temperature=0.5, logit_bias=((11, 60.0),), repetition_penalty=2.0, frequency_penalty=2.0, logprobs=3
    )
    state = LogitRules(params, [1], [4, 4], frozenset())
    logits = rows(1)
    (sampled,) = sample_chunks(logits.clone(), [ChunkSpec((1,), 0, (), params, state.edits())])
    assert sampled.token == 11
    assert sampled.logprobs == token_logprobs(logits, [11], [3])[0]


def test_only_who_asks_gets_them() -> None:
    asks = [None, 0, None, 2]
    chunks = [ChunkSpec((1,), 0, (), SamplingParams(logprobs=ask)) for ask in asks]
    sampled = sample_chunks(rows(4), chunks)
    assert [None if s.logprobs is None else len(s.logprobs.top) for s in sampled] == asks
    assert all(s.logprobs is None or s.logprobs.rank == 1 for s in sampled)
