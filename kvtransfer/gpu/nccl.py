"""NCCL through its C interface: communicators of two ranks that never block their caller.

CuPy's binding and torch's process groups block while two ranks meet, and have no way to give that up. NCCL
has one (`blocking = 0`, since 2.14): every call returns, one polls, and aborts after a deadline of one's own.
See https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/usage/communicators.html and nccl.h.
"""

import ctypes
import functools
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from pdserve.core.errors import Unavailable
from pdserve.kvtransfer.gpu.base import CommunicatorFailed, GpuStream

LIBRARY = "libnccl.so.2"
OLDEST = 21800
"""2.18.0: `_Config` is that version's, which later ones accept."""
UNIQUE_ID_BYTES = 128
LEAST_CHANNELS, MOST_CHANNELS = 2, 4
"""Of one communicator. Each costs device memory, about 6 MB, and a thread block while something moves."""

_SUCCESS, _IN_PROGRESS = 0, 7
_UINT8 = 1
_MAGIC = 0xCAFEBEEF
_DEFAULT = -(1 << 31)


class _UniqueId(ctypes.Structure):
    _fields_ = (("internal", ctypes.c_ubyte * UNIQUE_ID_BYTES),)


class Config(ctypes.Structure):
    """ncclConfig_t up to `trafficClass`, which is 2.18's padding."""

    _fields_ = (
        ("size", ctypes.c_size_t),
        ("magic", ctypes.c_uint),
        ("version", ctypes.c_uint),
        ("blocking", ctypes.c_int),
        ("cga_cluster_size", ctypes.c_int),
        ("min_ctas", ctypes.c_int),
        ("max_ctas", ctypes.c_int),
        ("net_name", ctypes.c_char_p),
        ("split_share", ctypes.c_int),
        ("traffic_class", ctypes.c_int),
    )

    @classmethod
    def of_a_pair(cls) -> "Config":
        return cls(
            size=ctypes.sizeof(cls),
            magic=_MAGIC,
            version=OLDEST,
            blocking=0,
            cga_cluster_size=_DEFAULT,
            min_ctas=LEAST_CHANNELS,
            max_ctas=MOST_CHANNELS,
            net_name=None,
            split_share=_DEFAULT,
            traffic_class=_DEFAULT,
        )


class NcclLibrary:
    """The functions of one libnccl, with their types."""

    def __init__(self, loaded: ctypes.CDLL) -> None:
        """Raises Unavailable for a library that is too old or has not what is needed."""
        pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
        types: dict[str, tuple[Any, ...]] = {
            "ncclGetVersion": (ctypes.POINTER(number),),
            "ncclGetUniqueId": (ctypes.POINTER(_UniqueId),),
            "ncclCommInitRankConfig": (
                ctypes.POINTER(pointer),
                number,
                _UniqueId,
                number,
                ctypes.POINTER(Config),
            ),
            "ncclCommGetAsyncError": (pointer, ctypes.POINTER(number)),
            "ncclCommAbort": (pointer,),
            "ncclSend": (pointer, size, number, number, pointer, pointer),
            "ncclRecv": (pointer, size, number, number, pointer, pointer),
        }
        try:
            for name, arguments in types.items():
                getattr(loaded, name).argtypes = arguments
            loaded.ncclGetErrorString.argtypes = (number,)
            loaded.ncclGetErrorString.restype = ctypes.c_char_p
        except AttributeError as error:
            raise Unavailable(f"{LIBRARY} is too old: {error}") from error
        self._loaded = loaded
        version = number()
        self.check("ncclGetVersion", self.call("ncclGetVersion", ctypes.byref(version)))
        self.version = version.value
        if self.version < OLDEST:
            raise Unavailable(f"{LIBRARY} is of version {self.version}, at least {OLDEST} is needed")

    def call(self, name: str, *arguments: Any) -> int:
        """Call a function that returns an ncclResult_t; without the GIL."""
        result: int = getattr(self._loaded, name)(*arguments)
        return result

    def check(self, name: str, result: int) -> bool:
        """Whether it is still in progress. Raises CommunicatorFailed for an error."""
        if result in (_SUCCESS, _IN_PROGRESS):
            return result == _IN_PROGRESS
        said: bytes = self._loaded.ncclGetErrorString(result)
        raise CommunicatorFailed(f"{name}: {said.decode()} ({result}); NCCL_DEBUG=WARN tells more")


@functools.cache
def load_nccl() -> NcclLibrary:
    """This process's NCCL, the one that torch has loaded or another. Unavailable where there is none."""
    reasons = []
    for path in _places():
        try:
            loaded = ctypes.CDLL(path)
        except OSError as error:
            reasons.append(str(error))
            continue
        return NcclLibrary(loaded)
    raise Unavailable(f"NCCL cannot be loaded: {'; '.join(reasons)}")


def _places() -> Iterator[str]:
    """Where the loader finds it, and where its wheels put it."""
    yield LIBRARY
    if importlib.util.find_spec("nvidia") is not None:
        found = importlib.util.find_spec("nvidia.nccl")
        for folder in (found.submodule_search_locations or ()) if found is not None else ():
            yield str(Path(folder) / "lib" / LIBRARY)


class NcclCommunicators:
    """Communicators of one device, which `current` makes the calling thread's."""

    def __init__(self, library: NcclLibrary, current: Callable[[], AbstractContextManager[object]]) -> None:
        self._library = library
        self._current = current
        self.version = library.version

    def unique_id(self) -> bytes:
        made = _UniqueId()
        with self._current():
            result = self._library.call("ncclGetUniqueId", ctypes.byref(made))
        self._library.check("ncclGetUniqueId", result)
        return bytes(made.internal)

    def join(self, unique_id: bytes, rank: int) -> "NcclCommunicator":
        if len(unique_id) != UNIQUE_ID_BYTES:
            raise CommunicatorFailed(f"a unique id has {UNIQUE_ID_BYTES} bytes, got {len(unique_id)}")
        name, handle = _UniqueId.from_buffer_copy(unique_id), ctypes.c_void_p()
        config = Config.of_a_pair()
        with self._current():
            result = self._library.call(
                "ncclCommInitRankConfig", ctypes.byref(handle), 2, name, rank, ctypes.byref(config)
            )
        self._library.check("ncclCommInitRankConfig", result)
        return NcclCommunicator(self._library, self._current, handle, peer=1 - rank)


class NcclCommunicator:
    """One ncclComm_t."""

    def __init__(
        self,
        library: NcclLibrary,
        current: Callable[[], AbstractContextManager[object]],
        handle: ctypes.c_void_p,
        *,
        peer: int,
    ) -> None:
        self._library = library
        self._current = current
        self._handle: ctypes.c_void_p | None = handle
        self._peer = peer

    def busy(self) -> bool:
        state = ctypes.c_int()
        self._call("ncclCommGetAsyncError", self._open(), ctypes.byref(state))
        return self._library.check("NCCL", state.value)

    def send(self, pointer: int, num_bytes: int, stream: GpuStream) -> None:
        self._call("ncclSend", pointer, num_bytes, _UINT8, self._peer, self._open(), stream.handle)

    def receive(self, pointer: int, num_bytes: int, stream: GpuStream) -> None:
        self._call("ncclRecv", pointer, num_bytes, _UINT8, self._peer, self._open(), stream.handle)

    def abort(self) -> None:
        if self._handle is not None:
            handle, self._handle = self._handle, None
            self._call("ncclCommAbort", handle)

    def _open(self) -> ctypes.c_void_p:
        if self._handle is None:
            raise CommunicatorFailed("this communicator was aborted")
        return self._handle

    def _call(self, name: str, *arguments: Any) -> None:
        with self._current():
            result = self._library.call(name, *arguments)
        self._library.check(name, result)
