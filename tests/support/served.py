"""`pdserve serve` as a user runs it: a process of its own, with a ready file, ended by a signal."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

START_TIMEOUT_S = 150.0
STOP_TIMEOUT_S = 40.0
PDSERVE = Path(sys.executable).with_name("pdserve")


class Served:
    """A running cluster. `record` is what its ready file said."""

    def __init__(self, *flags: str) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="pdserve-served-"))
        self.ready_file = self.folder / "ready.json"
        self._log = self.folder / "log"
        self._shared_before = shared_memory()
        self.home = self.folder / "home"
        self.home.mkdir()
        with self._log.open("w") as log:
            self.popen = subprocess.Popen(
                [PDSERVE, "serve", "--grpc-port", "0", "--ready-file", self.ready_file, *flags],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "HOME": str(self.home)},
            )
        try:
            self.record = self._wait_ready()
        except BaseException:
            self.popen.kill()
            raise

    @property
    def target(self) -> str:
        return str(self.record["grpc"])

    @property
    def log(self) -> str:
        return self._log.read_text()

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Signal the cluster and wait for its end; returns the exit status."""
        if self.popen.poll() is None:
            self.popen.send_signal(number)
        return self.popen.wait(STOP_TIMEOUT_S)

    def left_behind(self) -> dict[str, Any]:
        """What an ended cluster should have taken with it, and did not; empty when all is gone."""
        pids = [pid for group in self.record["pids"].values() for pid in group]
        deadline = time.monotonic() + 10
        while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
            time.sleep(0.05)
        found: dict[str, Any] = {
            "processes": [pid for pid in pids if alive(pid)] + children_of(self.popen.pid),
            "shared memory": sorted(shared_memory() - self._shared_before),
            "files": [str(path) for path in (self.ready_file, *self.home.rglob("*token*")) if path.exists()],
        }
        return {what: things for what, things in found.items() if things}

    def _wait_ready(self) -> dict[str, Any]:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self.ready_file.exists():
            assert self.popen.poll() is None, f"pdserve serve ended:\n{self.log[-4000:]}"
            assert time.monotonic() < deadline, f"not ready in time:\n{self.log[-4000:]}"
            time.sleep(0.05)
        return dict(json.loads(self.ready_file.read_text()))


def alive(pid: int) -> bool:
    """A process that runs; a zombie does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def children_of(pid: int) -> list[int]:
    """Living processes of the session that `pid` led or started."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
            if parent == pid and alive(int(entry.name)):
                found.append(int(entry.name))
    return found


def shared_memory() -> set[str]:
    return {path.name for path in Path("/dev/shm").iterdir()}
