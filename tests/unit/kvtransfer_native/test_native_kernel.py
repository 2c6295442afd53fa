"""Native copies and digests are those of numpy and xxhash, whatever the layout."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pdserve.kvtransfer.native import kernel as native
from pdserve.kvtransfer.native.kernel import Kernel, NativeKernel, NumpyKernel, load_kernel
from pdserve.kvtransfer.pool.layout import KvLayout

LAYOUT = KvLayout(num_layers=2, num_kv_heads=2, head_dim=5, dtype="bfloat16")


@st.composite
def layouts(draw: st.DrawFn) -> KvLayout:
    return KvLayout(
        num_layers=draw(st.integers(1, 3)),
        num_kv_heads=draw(st.integers(1, 3)),
        head_dim=draw(st.one_of(st.integers(1, 70), st.sampled_from([64, 128, 129, 257]))),
        dtype=draw(st.sampled_from(["float32", "bfloat16", "float16"])),
        block_tokens=draw(st.sampled_from([1, 3, 16])),
    )


def rows_of(layout: KvLayout, count: int, seed: int, shift: int = 0) -> NDArray[np.uint8]:
    """Random blocks that begin `shift` bytes behind an aligned address."""
    memory = np.random.default_rng(seed).integers(0, 256, count * layout.block_bytes + shift, np.uint8)
    return memory[shift:].reshape(count, layout.block_bytes)


def index(*numbers: int) -> NDArray[np.int64]:
    return np.array(numbers, np.int64)


@pytest.fixture(scope="module")
def kernel() -> Kernel:
    loaded = load_kernel()
    assert isinstance(loaded, NativeKernel), "these tests need g++ on the PATH"
    return loaded


@pytest.fixture(params=[0, 1 << 40], ids=["past the caches", "through the caches"])
def threshold(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(native, "PAST_CACHES_BYTES", request.param)
    return int(request.param)


@settings(max_examples=60, deadline=None)
@given(layout=layouts(), past=st.booleans(), shift=st.integers(0, 63), data=st.data())
def test_every_layout_is_copied_and_digested_as_the_reference_does(
    layout: KvLayout, past: bool, shift: int, data: st.DataObject
) -> None:
    kernel, reference = load_kernel(), NumpyKernel()
    assert isinstance(kernel, NativeKernel), "these tests need g++ on the PATH"
    source, count = rows_of(layout, 6, 1, shift), 4
    chosen = index(*data.draw(st.lists(st.integers(0, 5), min_size=count, max_size=count)))
    places = index(*data.draw(st.permutations(range(6)))[:count])
    valid = index(*data.draw(st.lists(st.integers(1, layout.block_tokens), min_size=count, max_size=count)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "PAST_CACHES_BYTES", 0 if past else 1 << 40)
        patch.setattr(native, "SCRATCH_BYTES", data.draw(st.sampled_from([0, 1000, 16 << 10])))
        expected, target = rows_of(layout, 6, 2, 63 - shift), rows_of(layout, 6, 2, 63 - shift)
        digests = reference.copy_and_digest(source, chosen, expected, places, valid, layout)
        assert np.array_equal(kernel.copy_and_digest(source, chosen, target, places, valid, layout), digests)
        assert np.array_equal(target, expected)
        assert np.array_equal(kernel.digest(source, chosen, valid, layout), digests)
        target = rows_of(layout, 6, 2, 63 - shift)
        kernel.copy(source, chosen, target, places)
        assert np.array_equal(target, expected)


def test_every_length_of_a_segment_has_the_reference_digest(kernel: Kernel) -> None:
    for half in (*range(1, 160), 511, 512, 513, 1024, 2049):
        layout = KvLayout(1, 2, half, "bfloat16", block_tokens=1)
        rows, chosen, valid = rows_of(layout, 2, half), index(1, 0), index(1, 1)
        assert np.array_equal(
            kernel.digest(rows, chosen, valid, layout), NumpyKernel().digest(rows, chosen, valid, layout)
        ), 2 * half


def test_a_read_only_source_is_enough(kernel: Kernel, threshold: int) -> None:
    source, target = rows_of(LAYOUT, 3, 0), rows_of(LAYOUT, 3, 1)
    source.flags.writeable = False
    kernel.copy(source, index(2, 0), target, index(0, 1))
    assert np.array_equal(target[:2], source[[2, 0]])


@pytest.mark.parametrize("which", ["native", "numpy"])
def test_nothing_outside_either_matrix_is_touched(which: str, kernel: Kernel) -> None:
    subject = kernel if which == "native" else NumpyKernel()
    source, target = rows_of(LAYOUT, 3, 0), rows_of(LAYOUT, 3, 1)
    before = target.copy()
    for bad in (-1, 3):
        with pytest.raises(IndexError):
            subject.copy(source, index(0, bad), target, index(0, 1))
        with pytest.raises(IndexError):
            subject.copy(source, index(0, 1), target, index(0, bad))
        with pytest.raises(IndexError):
            subject.digest(source, index(bad), index(1), LAYOUT)
    for valid in (0, 17):
        with pytest.raises(ValueError, match="valid tokens"):
            subject.copy_and_digest(source, index(0), target, index(1), index(valid), LAYOUT)
    with pytest.raises(ValueError, match="do not fit"):
        subject.copy(source, index(0, 1), target, index(0))
    with pytest.raises(ValueError, match="do not fit"):
        subject.copy(source, index(0), target[:, :-1].copy(), index(0))
    with pytest.raises(ValueError, match="C order"):
        subject.copy(source[:, ::2], index(0), target, index(0))
    target.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        subject.copy(source, index(0), target, index(0))
    assert np.array_equal(target, before)


def test_no_rows_are_no_work(kernel: Kernel) -> None:
    source, target, none = rows_of(LAYOUT, 3, 0), rows_of(LAYOUT, 3, 1), index()
    before = target.copy()
    assert kernel.copy_and_digest(source, none, target, none, none, LAYOUT).size == 0
    assert np.array_equal(target, before)
