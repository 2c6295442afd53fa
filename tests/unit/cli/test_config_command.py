"""`pdserve config` prints what `pdserve serve` would run, so that it can be given back to it."""

import json
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.cli.app import run
from pdserve.cli.config_command import as_toml, without_password
from pdserve.core.config import ServeConfig, from_mapping
from pdserve.core.config_sources import Override, resolve

overrides = st.fixed_dictionaries(
    {},
    optional={
        "model": st.text(),
        "prefill": st.integers(1, 10**9),
        "ready_file": st.text(),
        "drain_grace_s": st.floats(0, 1e300),
        "engine.overbook": st.floats(1, 1e300),
        "handoff.digest": st.booleans(),
        "router.http_port": st.integers(0, 65535),
        "security.tokens_file": st.text(),
    },
)


@given(overrides)
def test_what_is_printed_is_the_same_configuration(values: dict[str, object]) -> None:
    values = {key: value for key, value in values.items() if "://" not in str(value)}
    resolved = resolve(None, {key: Override(value, f"--{key}") for key, value in values.items()})
    assert from_mapping(ServeConfig, tomllib.loads(as_toml(resolved))) == resolved.config


def test_every_value_is_shown_with_its_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "cluster.toml"
    path.write_text("prefill = 2\n[engine]\nthreads = 3\n")
    flags = [str(path), "--threads", "4", "--http-port", "8000"]
    assert run(["config", *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    shown = {tuple(line.split("#")[-1].split()) for line in lines if line.startswith(("prefill", "threads"))}
    assert shown == {(f"{path}:1",), ("--threads",)}
    assert run(["config", *flags, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values.keys() == resolve(None, {}).sources.keys()
    assert values["prefill"] == {"value": 2, "source": "file", "where": f"{path}:1"}
    assert values["engine.threads"] == {"value": 4, "source": "flag", "where": "--threads"}
    assert values["router.http_port"] == {"value": 8000, "source": "flag", "where": "--http-port"}
    assert values["decode"] == {"value": 1, "source": "default", "where": None}
    assert values["index.redis_url"] == {"value": None, "source": "default", "where": None}


def test_a_wrong_file_is_one_line_and_status_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "cluster.toml"
    path.write_text("[engine]\nthread = 3\n")
    assert run(["config", str(path)]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(
        f"pdserve: {path}:2: unknown key 'thread' in [engine]: did you mean threads?"
    )
    assert len(printed.err.splitlines()) == 1


def test_serve_resolves_as_config_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "cluster.toml"
    path.write_text("[engine]\nthread = 3\n")
    assert run(["config", str(path)]) == 1
    said = capsys.readouterr().err
    assert run(["serve", "--config", str(path)]) == 1
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://:secret@h:1/0", "redis://:***@h:1/0"),
        ("redis://me:sec:r@et@h:1/0", "redis://me:***@h:1/0"),
        ("redis://h/0?password=secret&x=1", "redis://h/0?password=***&x=1"),
        ("redis://:sec/ret@h:1/0", "redis://:***@h:1/0"),
        ("redis://:sec#ret@h", "redis://:***@h"),
        ("redis://:sec?ret@h", "redis://:***@h"),
        ("redis://:sec://ret@h", "redis://:***@h"),
        ("redis:/:secret@h", "redis:***@h"),
        (":secret@h", ":***@h"),
        ("rediss://h/0?ssl_Password=secret", "rediss://h/0?ssl_Password=***"),
        ("redis://h:1/0", "redis://h:1/0"),
        ("redis://me@h:1/0", "redis://me@h:1/0"),
    ],
)
def test_a_password_is_never_shown(url: str, shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither of a URL nor of what only resembles one."""
    assert without_password(url) == shown
    for flags in ([], ["--json"]):
        assert run(["config", "--redis-url", url, *flags]) == 0
        assert json.dumps(shown) in capsys.readouterr().out


def test_what_is_no_url_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["config", "--model", "a/path:with@signs"]) == 0
    assert 'model = "a/path:with@signs"' in capsys.readouterr().out
