"""The first signal ends a cluster in order, the second at once."""

import asyncio
import os
import signal
import subprocess
import sys
import textwrap

import pytest

from pdserve.cluster.signals import run_until_signal


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_cancels_and_waits_for_the_end(number: int) -> None:
    story: list[str] = []

    async def main() -> None:
        try:
            os.kill(os.getpid(), number)
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            story.append("ended in order")

    assert run_until_signal(main(), lambda: story.append("abandoned")) is None
    assert story == ["ended in order"]


def test_without_a_signal_the_result_comes_back() -> None:
    async def main() -> int:
        return 3

    assert run_until_signal(main(), lambda: None) == 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_the_process_at_once(number: int) -> None:
    script = textwrap.dedent(f"""
        import asyncio, os
        from pdserve.cluster.signals import run_until_signal
        async def main():
            try:
                os.kill(os.getpid(), {int(number)})
                await asyncio.Event().wait()
            finally:
                os.kill(os.getpid(), {int(number)})
                await asyncio.Event().wait()
        run_until_signal(main(), lambda: print("abandoned", flush=True))
    """)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30)
    assert done.returncode == 128 + number
    assert done.stdout == "abandoned\n"
