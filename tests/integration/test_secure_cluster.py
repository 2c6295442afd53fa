"""`pdserve serve` with TLS, mTLS, tokens and a locked redis: used, searched, and ended under load."""

import asyncio
import json
import os
import signal
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from locked_redis import PASSWORD, locked_redis
from served import Served
from stream_load import Load, ssl_context

from pdserve.cli.app import run
from pdserve.client import Client, Tls
from pdserve.core.errors import Unauthenticated, Unavailable

pytestmark = pytest.mark.timeout(300)

TOKEN = "token-of-the-tests-0123456789"
LOOPBACK = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}
"""127.0.0.1, ::1 and the first as an IPv6 address, as the kernel prints them."""
GRPC_POLLER_FDS = 8
"""The library's own, opened with the first channel; none per channel or call."""
WRONG = "wrong-token-of-the-tests-0123456789"


@dataclass(frozen=True)
class Secure:
    """A running cluster and what its clients need."""

    served: Served
    certs: Path
    config: Path

    @property
    def tls(self) -> Tls:
        return Tls(self.certs / "ca.pem", self.certs / "client.pem", self.certs / "client.key")

    @property
    def options(self) -> list[str]:
        folder = self.certs
        paths = {"--tls-ca": "ca.pem", "--tls-cert": "client.pem", "--tls-key": "client.key"}
        flags = [f"{flag}={folder / path}" for flag, path in paths.items()]
        return [f"--target={self.served.target}", *flags, f"--token-file={folder / 'token'}"]


@pytest.fixture(scope="module")
def secure(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secure]:
    """2 prefill + 2 decode workers of a tiny model, everything on."""
    folder = tmp_path_factory.mktemp("secure")
    certs = folder / "certs"
    assert run(["certs", str(certs)]) == 0
    (certs / "tokens").write_text(f"tests:{TOKEN}\n")
    (certs / "token").write_text(f"{TOKEN}\n")
    config = folder / "cluster.toml"
    with locked_redis() as port:
        config.write_text(
            f'[index]\nredis_url = "redis://:{PASSWORD}@127.0.0.1:{port}/0"\n'
            f'[security]\ntls_dir = "{certs}"\nclient_certificates = true\n'
            f'tokens_file = "{certs / "tokens"}"\n[router]\nhttp_port = 0\ndisaggregation = "always"\n'
        )
        flags = ("--prefill", "2", "--decode", "2", "--pool-blocks", "512", "--drain-grace", "0")
        served = Served("--config", str(config), "--model", str(tiny_model), *flags)
        try:
            yield Secure(served, certs, config)
        finally:
            status = served.stop()
            left = served.left_behind()
        assert status == 0, served.log[-4000:]
        assert not left, left


def test_everything_works_with_credentials_and_nothing_without(
    secure: Secure, capsys: pytest.CaptureFixture[str]
) -> None:
    target = secure.served.target
    with Client(target, timeout=60, tls=secure.tls, token=TOKEN) as client:
        result = client.generate("a prompt of more than one block of tokens", max_tokens=4, ignore_eos=True)
        assert result.route.transport == "shm"
        admin = client.status().admin
    with Client(target, timeout=10, tls=secure.tls, token=WRONG) as client, pytest.raises(Unauthenticated):
        client.status()
    nameless = Tls(secure.certs / "ca.pem")
    with Client(target, timeout=10, tls=nameless, token=TOKEN) as client, pytest.raises(Unavailable):
        client.status()
    assert run(["status", "--json", *secure.options]) == 0
    assert run(["members", "list", *secure.options]) == 0
    capsys.readouterr()
    for flags in ([], [f"--tls-ca={secure.certs / 'ca.pem'}", f"--token={TOKEN}"], secure.options[1:-1]):
        assert run(["members", "list", f"--admin={admin}", *flags]) == 1
    complaints = capsys.readouterr().err
    assert "this needs a token" in complaints
    assert TOKEN not in complaints


def test_the_http_api_wants_both_as_well(secure: Secure) -> None:
    base = f"https://{secure.served.record['http']}"
    with httpx.Client(base_url=base, verify=ssl_context(secure.tls)) as client:
        assert client.get("/v1/models").status_code == 401
        models = client.get("/v1/models", headers={"authorization": f"Bearer {TOKEN}"})
        assert len(models.json()["data"]) == 1


def test_no_process_listens_beyond_loopback(secure: Secure) -> None:
    found = secure.served.listening()
    assert len(found) >= 5, "router twice, two workers and the membership service at least"
    assert {address for address, _ in found} <= LOOPBACK


def test_no_secret_is_in_a_log_a_file_a_command_line_or_an_answer(
    secure: Secure, capfd: pytest.CaptureFixture[str]
) -> None:
    """What the tests above provoked is in the logs by now."""
    assert run(["status", *secure.options]) == 0
    assert run(["config", str(secure.config)]) == 0
    served = secure.served
    captured = capfd.readouterr()
    texts = {
        "log": served.log,
        "ready file": served.ready_file.read_text(),
        "commands": captured.out + captured.err,
    }
    for pid in served.descendants():
        texts[f"command line of {pid}"] = Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
    for path in served.temporary.rglob("*"):
        if path.is_file() and path.stat().st_size < 50_000_000:
            texts[path.name] = path.read_text(errors="replace")
    assert len(texts) > 10
    keys = [path.read_text().splitlines()[1] for path in secure.certs.glob("*.key")]
    for secret in (TOKEN, WRONG, PASSWORD, *keys):
        assert not [where for where, text in texts.items() if secret in text]
    assert "is refused" in "".join(texts.values()), "nothing would be found where nothing is logged"
    assert json.loads(texts["ready file"])["grpc"] == served.target


async def test_sigterm_under_load_leaves_no_process_port_segment_or_file(secure: Secure) -> None:
    """The last of this module: it ends the cluster."""
    served = secure.served
    own_fds = open_fds()
    load = Load(served, secure.tls, TOKEN)
    running = asyncio.create_task(load.run())
    try:
        await load.until_all_flow()
        ports = {port for _, port in served.listening()}
        assert {port_of(served.record["grpc"]), port_of(served.record["http"])} <= ports
    finally:
        status = await asyncio.to_thread(served.stop, signal.SIGTERM)
    assert status == 0, served.log[-4000:]
    await running
    assert await asyncio.to_thread(served.left_behind) == {}
    assert not [port for port in ports if is_listening(port)]
    assert "Traceback" not in served.log, served.log[-4000:]
    # Nobody waits in vain: a stream ended by itself, or was told that a retry may help.
    assert set(load.ends.values()) <= {"finished", "told"}, load.ends
    assert "told" in load.ends.values(), "the load ended before the signal"
    assert open_fds() <= own_fds + GRPC_POLLER_FDS


def port_of(endpoint: str) -> int:
    return int(endpoint.rpartition(":")[2])


def is_listening(port: int) -> bool:
    """Whether anybody accepts on it now."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def open_fds() -> int:
    """File descriptors of this process."""
    return len(os.listdir("/proc/self/fd"))
