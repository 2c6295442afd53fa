"""`pdserve serve` when things go wrong: one line that says why, and nothing left running."""

import os
import shutil
import signal
import socket
import subprocess
import time
import uuid
from pathlib import Path

import pytest
from served import PDSERVE, Served, alive, shared_memory

pytestmark = pytest.mark.timeout(120)

END_S = 10.0
TAG = "PDSERVE_TEST_TAG"


class Run:
    """`pdserve serve` with a mark in its environment that all its descendants inherit."""

    def __init__(self, folder: Path, *flags: str) -> None:
        self.ready_file = folder / "ready.json"
        self._mark = f"{TAG}={uuid.uuid4().hex}"
        name, _, value = self._mark.partition("=")
        (folder / "home").mkdir()
        self._shared_before = shared_memory()
        self.popen = subprocess.Popen(
            [PDSERVE, "serve", "--ready-file", self.ready_file, *flags],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, name: value, "HOME": str(folder / "home")},
        )

    def error(self) -> str:
        """Waits for the end; the last line on stderr. Before it, at most what was about to start; nothing was
        said on stdout, nothing is left."""
        out, err = self.popen.communicate(timeout=60)
        assert self.popen.returncode == 1, err
        assert out == ""
        *before, last = err.splitlines()
        assert len(before) <= 1, err
        assert all(line.startswith("pdserve starts ") for line in before), err
        assert last.startswith("pdserve: ")
        self.assert_nothing_left()
        return last

    def assert_nothing_left(self) -> None:
        deadline = time.monotonic() + END_S
        while self.descendants() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not self.descendants()
        assert not self.ready_file.exists()
        assert shared_memory() <= self._shared_before
        assert not list((self.ready_file.parent / "home").rglob("*token*"))
        assert not list(Path("/tmp").glob(f"pdserve-ray-*/session_*_{self.popen.pid}"))

    def descendants(self) -> list[str]:
        """Living processes that carry the mark."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and alive(int(entry.name)):
                try:
                    carries = self._mark in (entry / "environ").read_text(errors="replace")
                    line = (entry / "cmdline").read_text(errors="replace")
                except (FileNotFoundError, ProcessLookupError, PermissionError):
                    continue
                if carries:
                    found.append(f"{entry.name} {line[:300]}")
        return found


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--model", "nowhere"), "no model 'nowhere'"),
        (("--redis-url", "htp://x"), "index.redis_url is not a redis URL"),
        (("--ray-address", "127.0.0.1:1", "--grpc-port", "0"), "no Ray answers at 127.0.0.1:1"),
        (("--dtype", "float8"), "dtype is 'float8': it must be one of"),
        (("--transport", "pigeon"), "handoff.transport is 'pigeon': it must be one of"),
        pytest.param(
            ("--redis-url", "redis://127.0.0.1:1/0"),
            "the configured redis did not answer within",
            marks=pytest.mark.full,  # it waits for one that may still come
        ),
    ],
)
def test_a_wrong_start_is_one_line(
    tiny_model: Path, tmp_path: Path, flags: tuple[str, ...], says: str
) -> None:
    model = () if "--model" in flags else ("--model", str(tiny_model))
    assert says in Run(tmp_path, *model, *flags).error()


def test_an_unknown_configuration_key_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "cluster.toml"
    file.write_text("[engine]\npool_block = 5\n")
    error = Run(tmp_path, "--config", str(file)).error()
    assert "pool_block" in error
    assert "pool_blocks" in error
    assert str(file) in error


@pytest.mark.parametrize("flag", ["--grpc-port", "--http-port"])
def test_a_taken_port_is_one_line(tiny_model: Path, tmp_path: Path, flag: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        ports = {"--grpc-port": "0", flag: port}
        flags = [part for pair in ports.items() for part in pair]
        error = Run(tmp_path, "--model", str(tiny_model), *flags).error()
    assert f"cannot listen on 127.0.0.1:{port} (Address already in use)" in error


def test_a_worker_that_cannot_load_ends_the_start_with_the_workers_own_words(
    tiny_model: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in tiny_model.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    error = Run(tmp_path, "--model", str(broken), "--grpc-port", "0").error()
    assert f"cannot read {weights}" in error


def test_a_signal_during_the_start_ends_it_in_order(tiny_model: Path, tmp_path: Path) -> None:
    run = Run(tmp_path, "--model", str(tiny_model), "--grpc-port", "0")
    deadline = time.monotonic() + 60
    try:
        while not any("gcs_server" in line for line in run.descendants()):
            assert run.popen.poll() is None
            assert time.monotonic() < deadline, run.descendants()
            time.sleep(0.02)
    finally:
        run.popen.send_signal(signal.SIGTERM)  # also when the test fails: it leaves no cluster behind
    _, err = run.popen.communicate(timeout=30)
    assert run.popen.returncode == 0, err
    assert "Traceback" not in err
    run.assert_nothing_left()


def test_a_killed_supervisor_takes_its_workers_and_its_redis_along(tiny_model: Path) -> None:
    served = Served("--model", str(tiny_model), "--pool-blocks", "64")
    pids = [pid for group in served.record["pids"].values() for pid in group]
    assert len(pids) == 5
    served.popen.kill()
    served.popen.wait(10)
    deadline = time.monotonic() + END_S
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < deadline, [pid for pid in pids if alive(pid)]
        time.sleep(0.05)
    for session in Path("/tmp").glob(f"pdserve-ray-*/session_*_{served.popen.pid}"):
        shutil.rmtree(session.parent)  # files are all that a killed supervisor leaves
