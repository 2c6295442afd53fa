"""A wrong configuration is refused before anything starts, in words that help."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from pdserve.core.config import (
    EngineConfig,
    HandoffConfig,
    IndexConfig,
    RouterConfig,
    ServeConfig,
    SessionConfig,
    from_mapping,
    load_toml,
    merge,
    to_mapping,
)
from pdserve.core.errors import ConfigError


def write(folder: Path, text: str) -> Path:
    path = folder / "cluster.toml"
    path.write_text(text)
    return path


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    assert load_toml(write(tmp_path, "")) == ServeConfig()


def test_tables_become_their_sections(tmp_path: Path) -> None:
    path = write(tmp_path, 'prefill = 2\n[engine]\noverbook = 2\n[index]\nredis_url = "redis://h:1/0"\n')
    config = load_toml(path)
    assert config.prefill == 2
    assert config.engine == EngineConfig(overbook=2.0)
    assert isinstance(config.engine.overbook, float)
    assert config.index.redis_url == "redis://h:1/0"
    assert config.handoff == HandoffConfig()


def test_overrides_win_key_by_key(tmp_path: Path) -> None:
    path = write(tmp_path, "[engine]\npool_blocks = 9\nthreads = 3\n")
    config = load_toml(path, {"engine": {"threads": 1}, "mixed": 1})
    assert (config.engine.pool_blocks, config.engine.threads, config.mixed) == (9, 1, 1)


def test_an_unknown_key_is_named_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'pool_block' in \[engine\].*pool_blocks"):
        load_toml(write(tmp_path, "[engine]\npool_block = 9\n"))
    with pytest.raises(ConfigError, match=r"'engin' in the configuration.*engine"):
        load_toml(write(tmp_path, "[engin]\n"))


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("prefill = 1.5", "prefill"),
        ('prefill = "1"', "prefill"),
        ("prefill = true", "prefill"),
        ("dtype = 16", "dtype"),
        ("engine = 3", "engine"),
        ("ready_file = 3", "ready_file"),
        ("[handoff]\ndigest = 1", "handoff.digest"),
        ("[engine]\noverbook = true", "engine.overbook"),
        ('[index]\nttl_s = "3"', "index.ttl_s"),
    ],
)
def test_a_value_of_another_type_is_refused(tmp_path: Path, text: str, key: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{key} is .*it must be"):
        load_toml(write(tmp_path, text))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.toml"):
        load_toml(tmp_path / "absent.toml")


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        load_toml(tmp_path)


@pytest.mark.parametrize("content", [b"prefill = = 2", b"\xff\xfe"])
def test_what_is_not_toml_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "cluster.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_toml(path)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (EngineConfig, {"token_budget": 0}),
        (EngineConfig, {"chunk_tokens": 0}),
        (EngineConfig, {"max_sequences": 0}),
        (EngineConfig, {"pool_blocks": 0}),
        (EngineConfig, {"threads": 0}),
        (EngineConfig, {"overbook": 0.9}),
        (EngineConfig, {"overbook": float("nan")}),
        (EngineConfig, {"headroom_tokens": -1}),
        (HandoffConfig, {"transport": "pigeon"}),
        (HandoffConfig, {"export_share": 0.0}),
        (HandoffConfig, {"export_share": 1.1}),
        (HandoffConfig, {"heartbeat_s": 0.0}),
        (HandoffConfig, {"silence_s": 0.5}),
        (SessionConfig, {"heartbeat_s": 0.0}),
        (SessionConfig, {"silence_s": 0.25}),
        (SessionConfig, {"reattach_s": -1.0}),
        (SessionConfig, {"unacknowledged_tokens": 0}),
        (SessionConfig, {"client_buffer_tokens": 0}),
        (IndexConfig, {"cluster": ""}),
        (IndexConfig, {"cluster": "a}b"}),
        (IndexConfig, {"timeout_s": 0.0}),
        (IndexConfig, {"heartbeat_s": 0.0}),
        (IndexConfig, {"ttl_s": 0.5}),
        (RouterConfig, {"grpc_port": 65536}),
        (RouterConfig, {"grpc_port": -1}),
        (RouterConfig, {"max_in_flight": 0}),
        (RouterConfig, {"max_queue": -1}),
        (RouterConfig, {"max_prompt_bytes": 0}),
        (RouterConfig, {"universal_share": 0.0}),
        (ServeConfig, {"dtype": "float16"}),
        (ServeConfig, {"prefill": -1}),
        (ServeConfig, {"prefill": 0}),
        (ServeConfig, {"decode": 0}),
    ],
)
def test_a_value_out_of_bounds_is_refused(kind: type[Any], changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"it must be"):
        kind(**changes)


def test_a_mixed_worker_alone_is_a_cluster() -> None:
    assert ServeConfig(prefill=0, decode=0, mixed=1).mixed == 1


def test_mapping_and_back_is_the_same() -> None:
    config = ServeConfig(prefill=3, engine=EngineConfig(threads=2), index=IndexConfig(cluster="x"))
    assert from_mapping(ServeConfig, to_mapping(config)) == config


def test_merge_changes_neither_side() -> None:
    base, over = {"a": {"b": 1, "c": 2}}, {"a": {"b": 3}, "d": 4}
    assert merge(base, over) == {"a": {"b": 3, "c": 2}, "d": 4}
    assert (base, over) == ({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}, "d": 4})


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        ServeConfig().prefill = 2  # type: ignore[misc]
