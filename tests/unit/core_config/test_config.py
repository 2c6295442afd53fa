"""A wrong configuration is refused before anything starts, in words that help."""

import dataclasses
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
    to_mapping,
    value_types,
)
from pdserve.core.errors import ConfigError


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
        (RouterConfig, {"disaggregation": "sometimes"}),
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


def test_an_unknown_key_is_named_with_the_known_ones() -> None:
    with pytest.raises(
        ConfigError, match=r"'pool_block' in \[engine\]: did you mean pool_blocks\? known are "
    ):
        from_mapping(ServeConfig, {"engine": {"pool_block": 9}})
    with pytest.raises(ConfigError, match=r"'engin' in the configuration: did you mean engine\? known are "):
        from_mapping(ServeConfig, {"engin": {}})


def test_a_key_in_the_wrong_table_is_sent_to_its_own() -> None:
    with pytest.raises(
        ConfigError, match=r"'threads' in the configuration: did you mean threads in \[engine\]\?"
    ):
        from_mapping(ServeConfig, {"threads": 2})
    with pytest.raises(
        ConfigError, match=r"'prefill' in \[engine\]: did you mean prefill above all tables\?"
    ):
        from_mapping(ServeConfig, {"engine": {"prefill": 2}})


def test_every_value_has_one_type() -> None:
    leaves = dict(value_types())
    assert leaves["engine.threads"] is int
    assert leaves["index.redis_url"] == str | None
    assert "engine" not in leaves


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        ServeConfig().prefill = 2  # type: ignore[misc]
