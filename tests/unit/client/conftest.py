from collections.abc import Iterator

import pytest
from fake_inference import FakeInference

from pdserve.client import RetryPolicy


@pytest.fixture
def server() -> Iterator[FakeInference]:
    fake = FakeInference()
    yield fake
    fake.stop()


@pytest.fixture
def eager() -> RetryPolicy:
    """Three calls with next to no wait between them."""
    return RetryPolicy(base_s=0.001)
