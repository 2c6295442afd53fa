"""The transfer benchmark with real processes: its report is complete and adds up. No speed is asserted."""

import json
from pathlib import Path

import pytest

from pdserve.bench.transfer import LAYOUT, measure_transfers
from pdserve.cli.app import run
from pdserve.cli.bench_command import parse_size
from pdserve.core.errors import ConfigError
from pdserve.core.types import HandoffId
from pdserve.kvtransfer.transports import shm
from pdserve.kvtransfer.transports.base import Failed

BLOCK = LAYOUT.block_bytes


async def test_each_way_has_a_figure_for_each_size_and_they_add_up() -> None:
    report = await measure_transfers((BLOCK, 3 * BLOCK - 1), 3, transports=("inproc", "shm", "tcp"))
    sizes = (BLOCK, 3 * BLOCK)
    assert [figure.bytes for figure in report.ceiling] == list(sizes), "rounded up to whole blocks"
    assert {(f.transport, f.bytes, f.digest) for f in report.results} == {
        (name, size, digest) for name in ("shm", "tcp") for size in sizes for digest in (False, True)
    }
    assert [(f.transport, f.bytes) for f in report.peers] == [("gloo", size) for size in sizes]
    assert [skipped.name for skipped in report.skipped] == ["inproc"]
    ceilings = {figure.bytes: figure.p50_ms for figure in report.ceiling}
    for figure in (*report.ceiling, *report.results, *report.peers):
        assert figure.gb_per_s == pytest.approx(figure.bytes / figure.p50_ms / 1e6)
        assert figure.ratio_to_ceiling == pytest.approx(ceilings[figure.bytes] / figure.p50_ms)


def test_the_file_has_what_the_table_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "out.json"
    assert run(["bench", "transfer", "--size", "64KB", "--rounds", "1", "--json", str(file)]) == 0
    written = json.loads(file.read_text())
    assert {key for entry in written["results"] for key in entry} == {
        "transport",
        "bytes",
        "digest",
        "gb_per_s",
        "p50_ms",
        "ratio_to_ceiling",
    }
    assert written["peers"]
    shown = capsys.readouterr().out
    for entry in (*written["results"], *written["peers"], *written["ceiling"]):
        assert f"{entry['p50_ms']:.3f}" in shown
    assert "skipped inproc" in shown


def test_a_transport_that_fails_is_an_error_and_no_figure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def fetch(*_: object) -> Failed:
        return Failed(HandoffId("bench"), 0, 1, "the cable was cut")

    monkeypatch.setattr(shm.ShmImporter, "fetch", fetch)
    assert run(["bench", "transfer", "--size", "64KB", "--rounds", "1"]) == 1
    assert "the cable was cut" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "size"), [("65536", 65536), ("64KB", 65536), ("2 mb", 2 << 20), ("1GB", 1 << 30)]
)
def test_sizes_are_read_in_powers_of_1024(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "KB", "0", "-1", "1.5MB", "64KiB"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="a size is"):
        parse_size(text)
