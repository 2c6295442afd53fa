"""`pdserve status`: everything that the router says is on the page, on narrow terminals too."""

import io
import json

import pytest
from fake_cluster import FakeCluster
from rich.console import Console
from served import PDSERVE
from terminal import Terminal

from pdserve.cli.app import run
from pdserve.cli.status_page import size, status_page
from pdserve.client import Client


def test_the_page_has_every_figure(cluster: FakeCluster, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["status", "--target", cluster.target]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    member = ["decode-0", "decode", "ready", "f" * 16, "127.0.0.1:40001", "12", "1h", "1m"]
    assert member in rows
    assert ["decode-0", "2", "1", "0", "0", "5"] in rows  # running, waiting, in flight, handoffs, preempted
    assert ["decode-0", "50", "10", "0", "4", "0", "0", "64", "12"] in rows  # blocks by state
    assert ["decode-0", "shm", "7", "4", "3.0", "MB", "6.0", "MB", "9"] in rows
    text = "\n".join(" ".join(row) for row in rows)
    assert "index: redis answers\nlookups: 9, 0.5 ms on average; 1 unanswered\n" in text
    assert f"prompt blocks found: 5 of 20 (25 %)\nmembership: {cluster.target}\n3 requests in flight" in text


def test_json_has_every_figure(cluster: FakeCluster, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["status", "--target", cluster.target, "--json"]) == 0
    seen = json.loads(capsys.readouterr().out)
    (worker,) = seen["workers"]
    assert (worker["pid"], worker["uptime_s"], worker["preemptions"]) == (12, 3700, 5)
    (used,) = worker["transports"]
    assert used == {
        "transport": "shm",
        "chunks": 4,
        "bytes": 3_000_000,
        "seconds": 0.5,
        "pairs": 7,
        "falls": 9,
    }
    assert seen["index_use"]["found_blocks"] == 5


@pytest.mark.parametrize("width", [200, 80, 79, 40])
def test_every_figure_fits_every_width(cluster: FakeCluster, width: int) -> None:
    with Client(cluster.target) as client:
        page = status_page(client.status(), width)
    text = io.StringIO()
    Console(width=width, file=text).print(page)
    lines = text.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert "…" not in text.getvalue()
    words = text.getvalue().replace(",", " ").split()
    for figure in ("f" * 16, "127.0.0.1:40001", "12", "50", "10", "64", "shm", "3.0", "6.0"):
        assert any(word.startswith(figure) for word in words), figure


def test_watch_shows_changes_until_ctrl_c(cluster: FakeCluster) -> None:
    arguments = ["status", "--watch", "0.02", "--target", cluster.target]
    with Terminal(PDSERVE, *arguments, rows=50) as terminal:
        terminal.expect(cluster.target)
        cluster.supervised = False
        terminal.expect("nobody supervises")
        terminal.interrupt()
        status, printed = terminal.ended()
    assert status == 0
    assert "Traceback" not in printed


@pytest.mark.parametrize(
    ("num_bytes", "shown"),
    [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2.5e9, "2.5 GB"), (3e15, "3000.0 TB")],
)
def test_sizes_have_units(num_bytes: float, shown: str) -> None:
    assert size(num_bytes) == shown
