"""The cached library: whole or built again, whoever else builds it meanwhile; and what happens without."""

import logging
import multiprocessing
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from pdserve.kvtransfer.native import build as building
from pdserve.kvtransfer.native.build import NativeUnavailable, build, user_cache
from pdserve.kvtransfer.native.kernel import SOURCE, NativeKernel, NumpyKernel, make_kernel


def built_by_another(cache: Path, barrier: "multiprocessing.synchronize.Barrier", results: Path) -> None:
    barrier.wait()
    kernel = make_kernel(SOURCE, lambda: cache)
    (results / str(os.getpid())).write_text(kernel.name)


def test_a_second_build_takes_what_is_there(tmp_path: Path) -> None:
    first = build(SOURCE, tmp_path / "cache")
    made = first.stat()
    again = build(SOURCE, tmp_path / "cache")
    assert again == first
    assert (again.stat().st_ino, again.stat().st_mtime_ns) == (made.st_ino, made.st_mtime_ns)
    assert list((tmp_path / "cache").iterdir()) == [first], "nothing is left beside it"


def test_a_cached_library_needs_no_compiler_that_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(SOURCE, tmp_path)

    def broken(*_: object) -> None:
        raise AssertionError("compiled again")

    monkeypatch.setattr(building, "_compile", broken)
    assert NativeKernel(build(SOURCE, tmp_path)).name == "native"


@pytest.mark.parametrize("damage", ["a flipped bit", "cut short", "empty"])
def test_a_damaged_entry_is_built_again(tmp_path: Path, damage: str) -> None:
    entry = build(SOURCE, tmp_path)
    content = bytearray(entry.read_bytes())
    whole = bytes(content)
    content[len(content) // 2] ^= 1
    entry.write_bytes({"a flipped bit": bytes(content), "cut short": whole[:1000], "empty": b""}[damage])
    assert build(SOURCE, tmp_path) == entry
    assert entry.read_bytes() == whole
    assert make_kernel(SOURCE, lambda: tmp_path).name == "native"


def test_another_source_is_another_entry(tmp_path: Path) -> None:
    other = tmp_path / SOURCE.name
    shutil.copy(SOURCE, other)
    with other.open("a") as file:
        file.write("// changed\n")
    assert build(other, tmp_path / "cache") != build(SOURCE, tmp_path / "cache")


def test_processes_that_build_at_once_all_get_it(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), tmp_path / "results"
    results.mkdir()
    cache = tmp_path / "cache"
    processes = [context.Process(target=built_by_another, args=(cache, barrier, results)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert [path.read_text() for path in results.iterdir()] == ["native", "native"]
    assert len(list(cache.iterdir())) == 1


def test_without_a_compiler_the_fallback_works_and_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with caplog.at_level(logging.WARNING):
        kernel = make_kernel(SOURCE, lambda: tmp_path / "cache")
    assert isinstance(kernel, NumpyKernel)
    (line,) = caplog.messages
    assert "no compiler 'g++'" in line
    source, target = np.ones((2, 8), np.uint8), np.zeros((2, 8), np.uint8)
    kernel.copy(source, np.array([0]), target, np.array([1]))
    assert target.tolist() == [[0] * 8, [1] * 8]


@pytest.mark.parametrize(
    ("text", "says"),
    [("this is no C++", "failed with status 1"), ("int nothing;", "cannot be loaded")],
)
def test_a_source_that_gives_no_kernel_means_the_fallback(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str, says: str
) -> None:
    source = tmp_path / "blocks.cpp"
    source.write_text(text)
    assert isinstance(make_kernel(source, lambda: tmp_path / "cache"), NumpyKernel)
    assert says in caplog.text


def test_code_that_computes_something_else_is_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = tmp_path / "blocks.cpp"
    source.write_text(SOURCE.read_text().replace("0xC2B2AE3D27D4EB4F", "0xC2B2AE3D27D4EB4E"))
    assert isinstance(make_kernel(source, lambda: tmp_path / "cache"), NumpyKernel)
    assert "does not compute what it should" in caplog.text


def test_a_cache_that_others_may_write_is_not_loaded_from(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    cache.chmod(0o777)
    with pytest.raises(NativeUnavailable, match="may be written by others"):
        build(SOURCE, cache)


def test_the_cache_is_where_xdg_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_cache() == tmp_path / "pdserve"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative is to be ignored")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert user_cache() == tmp_path / "home" / ".cache" / "pdserve"
