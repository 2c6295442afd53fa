"""NIXL between two processes, as a peer of our transports: D reads scattered blocks out of P's pool.

Its progress thread is off. It is given its best: descriptors of all blocks are prepared once, a request is
made before the clock starts, and D asks for its end without pause. UCX takes shared memory only where its
endpoints do not watch for a peer's failure (`ucx_error_handling_mode`), else it goes over loopback TCP.
"""

import importlib
import logging
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pdserve.core.errors import Unavailable

_PACKAGES = ("nixl", "nixl_cu13", "nixl_cu12")
"""The first one needs both others; any of these two suffices, also without a GPU."""
_BACKEND = "UCX"
_OPTIONS = {"ucx_error_handling_mode": "none"}
_MEMORY = "DRAM"
_DEADLINE_S = 60.0


class NixlPeer(NamedTuple):
    """What the reader needs to know of the other side."""

    metadata: bytes
    address: int
    """Of its first block."""


def find_nixl() -> Any:
    """NIXL's module. Raises Unavailable where there is none, or where it does not work here."""
    reasons = []
    for package in _PACKAGES:
        try:
            module = importlib.import_module(f"{package}._api")
        except ImportError as error:
            reasons.append(str(error))
            continue
        logging.getLogger("nixl").setLevel(logging.WARNING)  # it tells standard output of every agent
        return module
    raise Unavailable(f"it is not installed ({reasons[-1]}): pip install --no-deps nixl-cu12")


class NixlPool:
    """One side's blocks, uint8 [n, block_bytes], and the agent that knows them."""

    def __init__(self, name: str, blocks: NDArray[np.uint8]) -> None:
        """Raises Unavailable where NIXL is missing or has no UCX."""
        nixl = find_nixl()
        self._blocks = blocks
        try:
            self._agent = nixl.nixl_agent(name, nixl.nixl_agent_config(enable_prog_thread=False, backends=[]))
            self._agent.create_backend(_BACKEND, _OPTIONS)
            self._agent.register_memory([(self._address, blocks.nbytes, 0, "")], _MEMORY)
        except Exception as error:  # its bindings raise their own errors, RuntimeErrors and KeyErrors
            raise Unavailable(f"NIXL does not start here: {type(error).__name__}: {error}") from error
        self._sides: tuple[Any, Any] | None = None

    @property
    def peer(self) -> NixlPeer:
        """This side, for the other one."""
        return NixlPeer(self._agent.get_agent_metadata(), self._address)

    def know(self, peer: NixlPeer) -> str:
        """Let the other side reach this one; returns its name."""
        name = self._agent.add_remote_agent(peer.metadata)
        return name.decode() if isinstance(name, bytes) else str(name)

    def connect(self, peer: NixlPeer) -> None:
        """Make ready to read `peer`'s blocks; its pool has as many as this one."""
        name = self.know(peer)
        self._agent.make_connection(name)
        self._sides = (
            self._agent.prep_xfer_dlist("NIXL_INIT_AGENT", self._descriptors(self._address), _MEMORY),
            self._agent.prep_xfer_dlist(name, self._descriptors(peer.address), _MEMORY),
        )

    def read(self, sources: Sequence[int], places: Sequence[int]) -> float:
        """Copy the other side's blocks `sources` to `places`; seconds. Raises Unavailable."""
        if self._sides is None:
            raise RuntimeError("connect first")
        here, there = self._sides
        handle = self._agent.make_prepped_xfer(
            "READ", here, np.array(places, np.int32), there, np.array(sources, np.int32)
        )
        began = time.perf_counter()
        state = self._agent.transfer(handle)
        while state == "PROC":
            state = self._agent.check_xfer_state(handle)
            if time.perf_counter() - began > _DEADLINE_S:
                state = f"not done after {_DEADLINE_S:g} s"
        taken = time.perf_counter() - began
        if state != "DONE":
            raise Unavailable(f"NIXL's transfer is {state}")
        handle.release()
        return taken

    @property
    def _address(self) -> int:
        return int(self._blocks.ctypes.data)

    def _descriptors(self, address: int) -> NDArray[np.uint64]:
        """[n, 3]: address, length and device of each block."""
        count, size = self._blocks.shape
        rows = np.zeros((count, 3), np.uint64)
        rows[:, 0] = address + np.arange(count, dtype=np.uint64) * np.uint64(size)
        rows[:, 1] = size
        return rows
