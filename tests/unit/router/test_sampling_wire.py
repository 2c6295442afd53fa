"""Messages to values: what the router fills in where a client said nothing."""

from pdserve.core.types import SamplingParams
from pdserve.proto import inference_pb2
from pdserve.proto.sampling import decode


def test_a_seed_that_was_not_given_is_another_one_each_time() -> None:
    seeds = {decode(inference_pb2.Sampling(temperature=0.8)).seed for _ in range(20)}
    assert len(seeds) == 20
    assert min(seeds) >= 0
    assert max(seeds) < 2**63


def test_what_was_given_is_kept_and_the_rest_has_its_defaults() -> None:
    given = decode(inference_pb2.Sampling(max_tokens=7, seed=0, ignore_eos=True))
    assert given == SamplingParams(max_tokens=7, seed=0, ignore_eos=True)
