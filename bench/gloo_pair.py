"""gloo between two processes, as a peer of our transports: one byte asks, contiguous bytes come back."""

import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed

_gloo: Any = torch.distributed
"""Its stubs know neither the stores nor a group's send and recv."""
_TIMEOUT = timedelta(seconds=60.0)
_HOST = "127.0.0.1"


class GlooAsker:
    """The side that is timed."""

    def __init__(self, num_bytes: int) -> None:
        self._store = _gloo.TCPStore(_HOST, 0, 2, True, _TIMEOUT, wait_for_workers=False)
        self._content = torch.zeros(num_bytes, dtype=torch.uint8)
        self._group: Any = None

    @property
    def port(self) -> int:
        """Where the other side, `answer`, finds this one."""
        return int(self._store.port)

    def meet(self) -> None:
        """Wait for the other side."""
        self._group = _gloo.ProcessGroupGloo(_gloo.PrefixStore("pair", self._store), 0, 2, _TIMEOUT)

    async def move(self) -> float:
        """Have all bytes sent once; the seconds that it took. It blocks: no thread in between is counted."""
        began = time.perf_counter()
        self._ask(1)
        return time.perf_counter() - began

    def end(self) -> None:
        """Let the other side go."""
        self._ask(0)

    def _ask(self, more: int) -> None:
        if self._group is None:
            raise RuntimeError("meet the other side first")
        self._group.send([torch.tensor([more], dtype=torch.uint8)], 1, 0).wait()
        if more:
            self._group.recv([self._content], 1, 0).wait()


def answer(port: int, num_bytes: int) -> None:
    """The other side, until it is let go."""
    store = _gloo.TCPStore(_HOST, port, 2, False, _TIMEOUT)
    group = _gloo.ProcessGroupGloo(_gloo.PrefixStore("pair", store), 1, 2, _TIMEOUT)
    asked, content = torch.zeros(1, dtype=torch.uint8), torch.ones(num_bytes, dtype=torch.uint8)
    while True:
        group.recv([asked], 0, 0).wait()
        if not int(asked[0]):
            return
        group.send([content], 0, 0).wait()
