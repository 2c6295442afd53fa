"""The transfer benchmark with real processes: its report is complete and adds up. No speed is asserted."""

import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import cast

import pytest

from pdserve.bench import transfer
from pdserve.bench.figures import Figure, Skipped, Transaction, TransferReport
from pdserve.bench.nixl_pair import NixlPeer
from pdserve.bench.transfer import LAYOUT, SIZES, measure_transfers
from pdserve.bench.transfer_source import TransferSource, fill
from pdserve.bench.transfer_target import TransferTarget
from pdserve.cli.app import run
from pdserve.cli.bench_transfer_command import parse_size
from pdserve.core.errors import ConfigError, Unavailable
from pdserve.core.types import HandoffId
from pdserve.kvtransfer.pool.storage import KvStorage
from pdserve.kvtransfer.transports import shm
from pdserve.kvtransfer.transports.base import TRANSPORT_LADDER, Failed, Grant, Landed, Offer
from pdserve.kvtransfer.transports.ladder import make_exporters

BLOCK = LAYOUT.block_bytes
HERE = ("inproc", "shm", "tcp")


async def test_each_way_has_a_figure_for_each_size_and_they_add_up() -> None:
    report = await measure_transfers((BLOCK, 3 * BLOCK - 1), 3)
    sizes = (BLOCK, 3 * BLOCK)
    assert {(f.transport, f.bytes) for f in report.ceiling} == {
        (copy, size) for copy in ("memcpy", "streaming") for size in sizes
    }, "rounded up to whole blocks"
    measured = {figure.transport for figure in report.results}
    assert measured >= set(HERE)
    assert {(f.transport, f.bytes, f.digest) for f in report.results} == {
        (name, size, digest) for name in measured for size in sizes for digest in (False, True)
    }
    assert {f.bytes for f in report.peers if f.transport == "gloo"} == set(sizes)
    assert {(t.transport, t.bytes, t.digest) for t in report.transactions} == {
        (name, BLOCK, digest) for name in measured - {"inproc"} for digest in (False, True)
    }, "between processes, of the smallest size"
    skipped = {skipped.name for skipped in report.skipped}
    assert set(TRANSPORT_LADDER) == measured | (skipped & set(TRANSPORT_LADDER)), (
        "every name of the ladder is accounted for"
    )
    assert not measured & skipped
    ceilings = {size: min(f.p50_ms for f in report.ceiling if f.bytes == size) for size in sizes}
    for figure in (*report.ceiling, *report.results, *report.peers):
        assert figure.gb_per_s == pytest.approx(figure.bytes / figure.p50_ms / 1e6)
        assert figure.ratio_to_ceiling == pytest.approx(ceilings[figure.bytes] / figure.p50_ms)


def test_the_file_and_the_chart_have_what_the_table_shows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = TransferReport("cpu", "native", 2)
    report.ceiling.append(Figure("memcpy", BLOCK, False, 10.5, 0.125, 1.0))
    report.peers.append(Figure("gloo", BLOCK, False, 1.5, 0.875, 0.25))
    report.results.extend(Figure("shm", BLOCK, digest, 5.5, 0.375, 0.5) for digest in (False, True))
    report.transactions.extend(Transaction("shm", BLOCK, digest, 2.625) for digest in (False, True))
    report.skipped.append(Skipped("nccl", "there is no cable"))
    asked = []

    async def measure(*arguments: object, device: str) -> TransferReport:
        asked.append((*arguments, device))
        return report

    monkeypatch.setattr(transfer, "measure_transfers", measure)
    file, drawing = tmp_path / "out.json", tmp_path / "out.svg"
    arguments = ["bench", "transfer", "--size", "64KB", "--size", "1MB", "--rounds", "2"]
    assert run([*arguments, "--json", str(file), "--plot", str(drawing)]) == 0
    assert asked == [((BLOCK, 1 << 20), 2, "cpu")]
    written = json.loads(file.read_text())
    assert written["results"][0] == {
        "transport": "shm",
        "bytes": BLOCK,
        "digest": False,
        "gb_per_s": 5.5,
        "p50_ms": 0.375,
        "ratio_to_ceiling": 0.5,
    }
    assert written["peers"][0].keys() == written["results"][0].keys()
    shown = capsys.readouterr().out
    for entry in (*written["results"], *written["peers"], *written["ceiling"], *written["transactions"]):
        assert f"{entry['p50_ms']:.3f}" in shown
    assert "skipped nccl: there is no cable" in shown
    for name in ("shm with digest", "gloo", "memcpy"):
        assert f"<!-- {name} -->" in drawing.read_text()


class SourceHere:
    """P's side in this process: what its errors are like needs no other one."""

    def __init__(self) -> None:
        self.storage = KvStorage(LAYOUT, 4)
        fill(self.storage)
        (self._exporter,) = make_exporters(self.storage, ("shm",))
        self.offers: tuple[Offer, ...] = ()

    async def start(self) -> None:
        await self._exporter.start()
        self.offers = (self._exporter.offer(),)

    def serve(self, transport: str, grant: Grant) -> None:
        """shm's P does nothing."""

    def join_nixl(self, reader: NixlPeer) -> NixlPeer:
        raise Unavailable("not here")


@pytest.fixture
async def target() -> AsyncIterator[TransferTarget]:
    source = SourceHere()
    await source.start()
    made = TransferTarget(LAYOUT, 4, cast(TransferSource, source), "cpu")
    yield made
    await made.close()
    source.storage.close()


async def test_a_transport_that_fails_is_an_error_and_no_figure(
    target: TransferTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fetch(*_: object) -> Failed:
        return Failed(HandoffId("bench"), 0, 1, "the cable was cut")

    monkeypatch.setattr(shm.ShmImporter, "fetch", fetch)
    with pytest.raises(Unavailable, match="the cable was cut"):
        await target.start(("shm",))


async def test_bytes_that_did_not_land_are_an_error_and_no_figure(
    target: TransferTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fetch(_: object, grant: Grant) -> Landed:
        return Landed(grant.handoff, grant.epoch, grant.seq, BLOCK * len(grant.segments), 0.0)

    monkeypatch.setattr(shm.ShmImporter, "fetch", fetch)
    with pytest.raises(Unavailable, match="did not land"):
        await target.start(("shm",))


def test_the_default_sizes_are_from_one_block_to_a_long_prompt() -> None:
    assert (SIZES[0], SIZES[-1]) == (64 << 10, 256 << 20)


@pytest.mark.parametrize(("device", "said"), [("tpu", "not 'tpu'"), ("cuda:99", "CUDA|CuPy|cuda:99")])
def test_a_device_that_is_not_there_is_told_before_anything_starts(
    device: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["bench", "transfer", "--device", device]) == 1
    assert re.search(said, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("text", "size"), [("65536", 65536), ("64KB", 65536), ("2 mb", 2 << 20), ("1GB", 1 << 30)]
)
def test_sizes_are_read_in_powers_of_1024(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "KB", "0", "-1", "1.5MB", "64KiB"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="a size is"):
        parse_size(text)
