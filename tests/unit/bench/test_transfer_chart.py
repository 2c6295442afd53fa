"""The chart of a transfer report."""

from pathlib import Path

import pytest

from pdserve.bench import chart
from pdserve.bench.figures import Figure, TransferReport
from pdserve.cli.app import run
from pdserve.core.errors import ConfigError


def report() -> TransferReport:
    made = TransferReport("cpu", "native", 3)
    for size in (1 << 20, 1 << 16):
        made.ceiling.append(Figure("memcpy", size, False, 10.0, 0.1, 1.0))
        made.peers.append(Figure("gloo", size, False, 1.0, 1.0, 0.1))
        for digest in (False, True):
            made.results.append(Figure("shm", size, digest, 5.0, 0.2, 0.5))
    return made


@pytest.mark.parametrize(("name", "start"), [("c.png", b"\x89PNG"), ("c.SVG", b"<?xml")])
def test_the_suffix_chooses_the_format(tmp_path: Path, name: str, start: bytes) -> None:
    chart.check_chart(tmp_path / name)
    chart.draw_chart(report(), tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(start)


@pytest.mark.parametrize("name", ["c.pdf", "c", "none/c.png"])
def test_a_file_that_could_not_be_drawn_is_refused_before_anything_is_measured(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match=r"chart is a|no folder"):
        chart.check_chart(tmp_path / name)
    assert run(["bench", "transfer", "--plot", str(tmp_path / name)]) == 1
    assert capsys.readouterr().out == ""


def test_a_missing_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'pdserve\[bench\]'"):
        chart.check_chart(tmp_path / "c.png")
