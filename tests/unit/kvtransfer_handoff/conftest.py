"""Handoffs here have deadlines of fractions of a second: native code is built before, as in a worker."""

import pytest

from pdserve.kvtransfer.native import load_kernel


@pytest.fixture(scope="session", autouse=True)
def built_kernel() -> None:
    load_kernel()
