"""What every process that the benchmarks start does first."""

import ctypes
import signal

_PR_SET_PDEATHSIG = 1


def follow_parent() -> None:
    """End with the thread that started this process, and leave Ctrl-C to it: it ends us in order."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
