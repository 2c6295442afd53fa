"""The copies and digests of a transfer behind one interface: native code, or numpy and xxhash without it.

Both give the same bytes, so a worker without a compiler pairs with one that has it.
"""

import ctypes
import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import xxhash
from numpy.typing import NDArray

from pdserve.kvtransfer.native.build import NativeUnavailable, build, user_cache
from pdserve.kvtransfer.pool.layout import KvLayout

_log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("blocks.cpp")

PAST_CACHES_BYTES = 4 << 20
"""From this size on a native copy goes past the caches: its target would not stay in them."""

SCRATCH_BYTES = 4 << 10
"""What a native copy reads before it digests it: little beside a first-level cache, and so little that memory
is never idle while the processor digests. Of 2 to 32 KB the fastest, by a tenth over 16."""

Rows = NDArray[np.uint8]
"""Host memory, [n, block_bytes] of some layout, C order."""
Index = NDArray[np.int64]


class Kernel(Protocol):
    """Works on rows (blocks) of matrices; one thread, the caller's, and without the GIL where native.

    Every method raises IndexError for a row that a matrix has not, and ValueError for sizes that do not fit.
    """

    name: str

    def digest(self, rows: Rows, chosen: Index, valid: Index, layout: KvLayout) -> NDArray[np.uint64]:
        """XXH3-64 of the first `valid[i]` tokens of each segment of row `chosen[i]`; [n, segments]."""
        ...

    def copy(self, source: Rows, chosen: Index, target: Rows, places: Index) -> None:
        """target[places[i]] = source[chosen[i]]."""
        ...

    def copy_and_digest(
        self, source: Rows, chosen: Index, target: Rows, places: Index, valid: Index, layout: KvLayout
    ) -> NDArray[np.uint64]:
        """Copy whole rows, and digest what was written as `digest` does."""
        ...


class NumpyKernel:
    """Where there is no compiler."""

    name = "numpy"

    def digest(self, rows: Rows, chosen: Index, valid: Index, layout: KvLayout) -> NDArray[np.uint64]:
        _check(rows, chosen)
        _check_valid(rows, chosen, valid, layout)
        out = np.empty((len(chosen), layout.segments_per_block), np.uint64)
        hashed, stride = xxhash.xxh3_64_intdigest, layout.segment_bytes
        for at, (row, tokens) in enumerate(zip(chosen.tolist(), valid.tolist(), strict=True)):
            content, size = rows[row].data, tokens * layout.token_bytes
            for segment in range(layout.segments_per_block):
                out[at, segment] = hashed(content[segment * stride : segment * stride + size], segment)
        return out

    def copy(self, source: Rows, chosen: Index, target: Rows, places: Index) -> None:
        _check_pair(source, chosen, target, places)
        for row, place in zip(chosen.tolist(), places.tolist(), strict=True):
            target[place] = source[row]

    def copy_and_digest(
        self, source: Rows, chosen: Index, target: Rows, places: Index, valid: Index, layout: KvLayout
    ) -> NDArray[np.uint64]:
        _check_valid(source, chosen, valid, layout)
        self.copy(source, chosen, target, places)
        return self.digest(target, places, valid, layout)


class NativeKernel:
    """blocks.cpp through ctypes, which releases the GIL for the length of a call."""

    name = "native"

    def __init__(self, library: Path) -> None:
        """Raises NativeUnavailable where the library cannot be loaded or computes something else."""
        try:
            loaded = ctypes.CDLL(str(library))
            self._digest_rows = loaded.pdserve_digest_rows
            self._copy_rows = loaded.pdserve_copy_rows
            self._copy_and_digest_rows = loaded.pdserve_copy_and_digest_rows
        except (OSError, AttributeError) as error:
            raise NativeUnavailable(f"{library} cannot be loaded: {error}") from error
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        self._digest_rows.argtypes = (pointer, pointer, pointer, number, number, number, pointer)
        self._copy_rows.argtypes = (*(pointer,) * 4, number, number, ctypes.c_int32)
        self._copy_and_digest_rows.argtypes = (
            *(pointer,) * 5,
            *(number,) * 3,
            ctypes.c_int32,
            pointer,
            number,
            pointer,
        )
        for function in (self._digest_rows, self._copy_rows, self._copy_and_digest_rows):
            function.restype = None

    def digest(self, rows: Rows, chosen: Index, valid: Index, layout: KvLayout) -> NDArray[np.uint64]:
        _check(rows, chosen)
        sizes = _check_valid(rows, chosen, valid, layout)
        out = np.empty((len(chosen), layout.segments_per_block), np.uint64)
        self._digest_rows(
            _at(rows),
            _at(chosen),
            _at(sizes),
            len(chosen),
            layout.segments_per_block,
            layout.segment_bytes,
            _at(out),
        )
        return out

    def copy(self, source: Rows, chosen: Index, target: Rows, places: Index) -> None:
        _check_pair(source, chosen, target, places)
        row_bytes = source.shape[1]
        past = len(chosen) * row_bytes >= PAST_CACHES_BYTES
        self._copy_rows(_at(source), _at(chosen), _at(target), _at(places), len(chosen), row_bytes, int(past))

    def copy_and_digest(
        self, source: Rows, chosen: Index, target: Rows, places: Index, valid: Index, layout: KvLayout
    ) -> NDArray[np.uint64]:
        _check_pair(source, chosen, target, places)
        sizes = _check_valid(source, chosen, valid, layout)
        out = np.empty((len(chosen), layout.segments_per_block), np.uint64)
        scratch = np.empty(max(layout.segment_bytes, SCRATCH_BYTES), np.uint8)
        past = len(chosen) * layout.block_bytes >= PAST_CACHES_BYTES
        self._copy_and_digest_rows(
            _at(source),
            _at(chosen),
            _at(target),
            _at(places),
            _at(sizes),
            len(chosen),
            layout.segments_per_block,
            layout.segment_bytes,
            int(past),
            _at(scratch),
            len(scratch),
            _at(out),
        )
        return out


@functools.cache
def load_kernel() -> Kernel:
    """This process's kernel, native where it can be. Compiles at first use: call it from a thread."""
    return make_kernel(SOURCE, user_cache)


def make_kernel(source: Path, cache: Callable[[], Path]) -> Kernel:
    """The native kernel out of `source`, else the fallback and one line in the log that says why."""
    try:
        kernel = NativeKernel(build(source, cache()))
        _prove(kernel)
    except (NativeUnavailable, OSError, RuntimeError) as error:
        _log.warning("kv transfer copies and digests in Python, several times slower: %s", error)
        return NumpyKernel()
    return kernel


def _prove(kernel: Kernel) -> None:
    """A few digests against the library that peers without native code use."""
    layout = KvLayout(num_layers=2, num_kv_heads=1, head_dim=33, dtype="bfloat16")
    rows = np.arange(2 * layout.block_bytes, dtype=np.uint32).astype(np.uint8).reshape(2, -1)
    target, valid = np.zeros_like(rows), np.array([16, 3], np.int64)
    chosen, places = np.array([0, 1], np.int64), np.array([1, 0], np.int64)
    expected = NumpyKernel().digest(rows, chosen, valid, layout)
    found = kernel.copy_and_digest(rows, chosen, target, places, valid, layout)
    if not (np.array_equal(found, expected) and np.array_equal(target, rows[::-1])):
        raise NativeUnavailable("the compiled code does not compute what it should")


def _at(array: NDArray[Any]) -> int:
    """The address of an array's first element; whoever passes it on keeps the array until the call ends."""
    return int(array.ctypes.data)


def _check(rows: Rows, chosen: Index) -> None:
    if rows.ndim != 2 or rows.dtype != np.uint8 or not rows.flags.c_contiguous:
        raise ValueError(f"rows are uint8 [n, block_bytes] in C order, got {rows.dtype} {list(rows.shape)}")
    if chosen.ndim != 1 or chosen.dtype != np.int64 or not chosen.flags.c_contiguous:
        raise ValueError(f"row numbers are int64 [n], got {chosen.dtype} {list(chosen.shape)}")
    if chosen.size and (int(chosen.min()) < 0 or int(chosen.max()) >= len(rows)):
        raise IndexError(f"rows {int(chosen.min())} to {int(chosen.max())} of {len(rows)} were asked for")


def _check_pair(source: Rows, chosen: Index, target: Rows, places: Index) -> None:
    _check(source, chosen)
    _check(target, places)
    if chosen.shape != places.shape or source.shape[1] != target.shape[1]:
        raise ValueError(
            f"{len(chosen)} rows of {source.shape[1]} bytes do not fit {len(places)} of {target.shape[1]}"
        )
    if not target.flags.writeable:
        raise ValueError("the target of a copy is read-only")


def _check_valid(rows: Rows, chosen: Index, valid: Index, layout: KvLayout) -> Index:
    """Valid bytes of a segment, for each row."""
    if rows.shape[1] != layout.block_bytes or valid.shape != chosen.shape:
        raise ValueError(
            f"{len(chosen)} rows of {rows.shape[1]} bytes with {len(valid)} counts of valid tokens, "
            f"for blocks of {layout.block_bytes} bytes"
        )
    if valid.size and (int(valid.min()) < 1 or int(valid.max()) > layout.block_tokens):
        raise ValueError(f"a block has 1 to {layout.block_tokens} valid tokens, got {valid.tolist()}")
    return np.ascontiguousarray(valid.astype(np.int64) * layout.token_bytes)
