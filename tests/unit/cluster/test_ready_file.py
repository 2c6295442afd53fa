"""The ready file is there, whole, exactly while the cluster serves."""

from pathlib import Path

import pytest

from pdserve.cluster.serve import ReadyFile
from pdserve.core.errors import ConfigError


def test_it_is_written_whole_and_leaves_no_part_beside_it(tmp_path: Path) -> None:
    file = ReadyFile(tmp_path / "ready.json")
    assert list(tmp_path.iterdir()) == []
    file.write("{}\n")
    assert file.path.read_text() == "{}\n"
    assert list(tmp_path.iterdir()) == [file.path]


def test_a_reader_of_the_old_file_keeps_the_old_text(tmp_path: Path) -> None:
    file = ReadyFile(tmp_path / "ready.json")
    file.write("old")
    with file.path.open() as reader:
        file.write("new")
        assert reader.read() == "old"
    assert file.path.read_text() == "new"


def test_one_of_an_earlier_run_is_gone_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "ready.json").write_text("of yesterday")
    file = ReadyFile(tmp_path / "ready.json")
    assert not file.path.exists()
    file.remove()


def test_a_folder_that_is_not_there_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot write the ready file"):
        ReadyFile(tmp_path / "nowhere" / "ready.json")


def test_a_write_that_fails_leaves_no_part(tmp_path: Path) -> None:
    file = ReadyFile(tmp_path / "ready.json")
    file.path.mkdir()
    with pytest.raises(OSError, match="directory"):
        file.write("{}")
    assert list(tmp_path.iterdir()) == [file.path]
