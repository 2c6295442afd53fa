"""Fixtures that more than one folder uses."""

import asyncio
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

# A runner in the background is started with SIGINT ignored, which children would inherit: tests press Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def leap(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], Awaitable[None]]:
    """`await leap(seconds)`: that much time has passed, for clocks and event loops, and due timers have run.

    With it a test of a deadline needs no short one, which a busy machine passes too early.
    """
    monotonic, leapt = time.monotonic, 0.0

    async def leap(seconds: float) -> None:
        nonlocal leapt
        leapt += seconds
        for _ in range(3):
            await asyncio.sleep(0)

    monkeypatch.setattr(time, "monotonic", lambda: monotonic() + leapt)
    return leap


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
