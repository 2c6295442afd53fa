"""Every value of the configuration has one source, and the strongest one wins."""

import tomllib
import types
import typing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pdserve.core.config import ServeConfig, to_mapping, value_types
from pdserve.core.config_sources import (
    DEFAULT,
    Override,
    Source,
    SourceKind,
    key_lines,
    resolve,
    value_at,
)
from pdserve.core.errors import ConfigError

DEFAULTS = to_mapping(ServeConfig())
KEYS = [key for key, _ in value_types()]
TIED = {"security.tls_certificate", "security.tls_key", "security.tls_ca"}
CHOSEN: dict[str, Any] = {
    "dtype": "bfloat16",
    "handoff.transport": "tcp",
    "index.cluster": "other",
    "router.disaggregation": "never",
}
"""Values of those keys that take few."""


def another(key: str) -> Any:
    """A value that is not the default and is allowed, whatever the other keys hold."""
    hint, default = dict(value_types())[key], value_at(DEFAULTS, key)
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if key in CHOSEN:
        return CHOSEN[key]
    if bool in kinds:
        return not default
    if float in kinds:
        return default * 1.5 if key != "handoff.export_share" else 0.75
    return (default or 0) + 1 if int in kinds else "else.where"


def literal(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value).replace("'", '"')


def toml_of(values: dict[str, Any]) -> str:
    """Plain keys first, for they belong to no table."""
    lines = [f"{key} = {literal(value)}" for key, value in values.items() if "." not in key]
    for table in dict.fromkeys(key.partition(".")[0] for key in values if "." in key):
        lines += ["", f"[{table}]  # a table"]
        for key, value in values.items():
            if key.startswith(f"{table}."):
                lines.append(f"{key.partition('.')[2]} = {literal(value)}")
    return "\n".join(lines) + "\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "cluster.toml"
    path.write_text(text)
    return path


def together(key: str) -> dict[str, Any]:
    """The key with those that it cannot be without."""
    needed = {name: another(name) for name in TIED} if key in TIED or key.startswith("security.") else {}
    if key == "security.worker_certificate" or key == "security.worker_key":
        needed |= {"security.worker_certificate": "w.pem", "security.worker_key": "w.key"}
    return {key: another(key), **needed}


@pytest.mark.parametrize("key", KEYS)
def test_every_value_can_be_set_by_the_file_and_says_so(tmp_path: Path, key: str) -> None:
    values = together(key)
    path = write(tmp_path, toml_of(values))
    resolved = resolve(path, {})
    assert value_at(to_mapping(resolved.config), key) == values[key] != value_at(DEFAULTS, key)
    assert {name for name, source in resolved.sources.items() if source is not DEFAULT} == set(values)
    where = resolved.sources[key].where
    line = path.read_text().splitlines()[int(where.rpartition(":")[2]) - 1]
    assert line.startswith(f"{key.rpartition('.')[2]} = ")


SAFE = sorted(key for key in KEYS if not key.startswith("security."))
"""Keys whose values are free of each other's, as `another` chooses them."""
subset = st.sets(st.sampled_from(SAFE))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(in_file=subset, by_flag=subset)
def test_a_flag_wins_over_the_file_and_the_file_over_the_default(
    tmp_path: Path, in_file: set[str], by_flag: set[str]
) -> None:
    path = write(tmp_path, toml_of({key: another(key) for key in in_file}))
    # A flag may say what the default is: it is the flag's all the same.
    flags = {key: value_at(DEFAULTS, key) if key in in_file else another(key) for key in by_flag}
    resolved = resolve(path, {key: Override(value, f"--{key}") for key, value in flags.items()})
    assert list(resolved.sources) == KEYS
    for key, value, source in resolved.values():
        if key in by_flag:
            assert (value, source) == (flags[key], Source(SourceKind.FLAG, f"--{key}"))
        elif key in in_file:
            assert (value, source.kind) == (another(key), SourceKind.FILE)
        else:
            assert (value, source) == (value_at(DEFAULTS, key), DEFAULT)


def test_lines_are_found_in_every_way_to_write_a_key() -> None:
    text = (
        '# first\nmodel = """\nof two\nlines"""\n\nengine.threads = 2\n[ router ] # door\n'
        "grpc_port = 1\n\n[index]\n cluster = 'x' \n\n[handoff]\r\ndigest = true\r\n"
    )
    assert tomllib.loads(text)
    assert key_lines(text) == {
        "model": 2,
        "engine": 6,
        "engine.threads": 6,
        "router": 7,
        "router.grpc_port": 8,
        "index": 10,
        "index.cluster": 11,
        "handoff": 13,
        "handoff.digest": 14,
    }
    inline = key_lines("engine = { threads = 2, overbook = 1.5 }\n")
    assert inline == {"engine": 1, "engine.threads": 1, "engine.overbook": 1}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("prefill = 1.5", "1: prefill is 1.5: it must be of type int"),
        ('\nprefill = "1"', "2: prefill is '1': it must be of type int"),
        ("prefill = true", "1: prefill is True: it must be of type int"),
        ("dtype = 16", "1: dtype is 16: it must be of type str"),
        ('dtype = "int3"', "1: dtype is 'int3': it must be one of"),
        ("engine = 3", "1: engine is 3: it must be a table"),
        ("ready_file = 3", "1: ready_file is 3: it must be of type str"),
        ("[handoff]\ndigest = 1", "2: handoff.digest is 1: it must be of type bool"),
        ("[engine]\noverbook = true", "2: engine.overbook is True: it must be of type float"),
        ("[engine]\noverbook = 0.5", "2: engine.overbook is 0.5: it must be at least 1.0"),
        ("[engine]\n\nthreads = [\n 3,\n]", "3: engine.threads is [3]: it must be of type int"),
        ("[[engine]]\nthreads = 3", "1: engine is [{'threads': 3}]: it must be a table"),
        ("[engine]\npool_block = 9", "2: unknown key 'pool_block' in [engine]: did you mean pool_blocks?"),
        ("[engin]", "1: unknown key 'engin' in the configuration: did you mean engine?"),
    ],
)
def test_what_is_wrong_in_a_file_is_named_with_its_line(tmp_path: Path, text: str, says: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as refused:
        resolve(path, {})
    assert refused.value.message.startswith(f"{path}:{says}")


def test_what_is_wrong_in_a_flag_is_named_with_the_flag(tmp_path: Path) -> None:
    path = write(tmp_path, "[engine]\nthreads = 1\n")
    with pytest.raises(ConfigError, match=r"^--threads: engine\.threads is 0: it must be at least 1$"):
        resolve(path, {"engine.threads": Override(0, "--threads")})


def test_what_no_key_alone_is_to_blame_for_is_named_with_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "prefill = 0\n")
    with pytest.raises(ConfigError) as refused:
        resolve(path, {})
    assert refused.value.message.startswith(f"{path}: workers is ")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no configuration file at .*absent\.toml"):
        resolve(tmp_path / "absent.toml", {})


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        resolve(tmp_path, {})


@pytest.mark.parametrize("content", [b"prefill = = 2", b"\xff\xfe", b"prefill = 1\nprefill = 2"])
def test_what_is_not_toml_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "cluster.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="not valid TOML"):
        resolve(path, {})


def test_a_flag_for_what_the_file_has_as_no_table_leaves_the_files_error(tmp_path: Path) -> None:
    path = write(tmp_path, "engine = 3\n")
    with pytest.raises(ConfigError, match=r"cluster\.toml:1: engine is 3: it must be a table"):
        resolve(path, {"engine.threads": Override(2, "--threads")})
