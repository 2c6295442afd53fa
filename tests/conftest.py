"""Fixtures that more than one folder uses."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

# A runner in the background is started with SIGINT ignored, which children would inherit: tests press Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny random checkpoint with a tokenizer."""
    from tiny_model import make_tiny_model

    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def redis() -> "Iterator[object]":
    """A redis server of our own."""
    from pdserve.cluster.redis_server import start_redis

    server = start_redis()
    yield server
    server.stop()
