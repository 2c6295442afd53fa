"""`pdserve serve` as a user runs it: a process of its own, with a ready file, ended by a signal."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

START_TIMEOUT_S = 150.0
STOP_TIMEOUT_S = 40.0
TAG = "PDSERVE_TEST_TAG"
TCP_LISTEN = "0A"
PDSERVE = Path(sys.executable).with_name("pdserve")


class Served:
    """A running cluster. `record` is what its ready file said."""

    def __init__(self, *flags: str) -> None:
        # Short: Ray's sockets lie below it, and a socket's path has 107 characters at most.
        self.folder = Path(tempfile.mkdtemp(prefix="pds-", dir="/tmp"))
        self.temporary = self.folder / "t"
        self.temporary.mkdir()
        self._mark = f"{TAG}={uuid.uuid4().hex}"
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
                env={
                    **os.environ,
                    "HOME": str(self.home),
                    "TMPDIR": str(self.temporary),
                    **dict([self._mark.split("=")]),
                },
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
        deadline = time.monotonic() + 10
        while self.descendants() and time.monotonic() < deadline:
            time.sleep(0.05)
        files = (self.ready_file, *self.temporary.iterdir(), *self.home.rglob("*token*"))
        found: dict[str, Any] = {
            "processes": [command(pid) for pid in self.descendants()],
            "shared memory": sorted(shared_memory() - self._shared_before),
            "files": [str(path) for path in files if path.exists()],
        }
        return {what: things for what, things in found.items() if things}

    def descendants(self) -> list[int]:
        """Living processes that it started, whoever adopted them since."""
        return marked_processes(self._mark)

    def listening(self) -> set[tuple[str, int]]:
        """TCP addresses, in the kernel's hexadecimal, and ports on which its processes accept."""
        inodes = {inode for pid in self.descendants() for inode in socket_inodes(pid)}
        found: set[tuple[str, int]] = set()
        for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
            for line in table.read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == TCP_LISTEN and fields[9] in inodes:
                    address, _, port = fields[1].rpartition(":")
                    found.add((address, int(port, 16)))
        return found

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


def marked_processes(mark: str) -> list[int]:
    """Living processes with `NAME=value` in the environment that they were started with."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and alive(int(entry.name)):
            try:
                carries = mark.encode() in (entry / "environ").read_bytes().split(b"\0")
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
            if carries:
                found.append(int(entry.name))
    return found


def command(pid: int) -> str:
    """For messages."""
    try:
        return f"{pid} " + Path(f"/proc/{pid}/cmdline").read_text(errors="replace").replace("\0", " ")[:300]
    except (FileNotFoundError, ProcessLookupError):
        return f"{pid} (ended)"


def socket_inodes(pid: int) -> set[str]:
    """Inodes of a process' sockets."""
    found = set()
    try:
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            link = str(fd.readlink())
            if link.startswith("socket:["):
                found.add(link[8:-1])
    except (FileNotFoundError, ProcessLookupError):
        pass
    return found


def shared_memory() -> set[str]:
    return {path.name for path in Path("/dev/shm").iterdir()}
