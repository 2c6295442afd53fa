from pathlib import Path

import pytest

from pdserve.cli.serve_command import PATHS, serve_config
from pdserve.core.config import ServeConfig, to_mapping
from pdserve.core.errors import ConfigError

TOML = """
model = "from-file"
prefill = 2
[engine]
pool_blocks = 77
[router]
grpc_port = 1234
"""


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    path = tmp_path / "cluster.toml"
    path.write_text(TOML)
    return path


def test_no_flags_are_the_defaults() -> None:
    assert serve_config(None, dict.fromkeys(PATHS)) == ServeConfig()


def test_every_flag_reaches_its_place() -> None:
    flags = {
        "model": "m",
        "dtype": "float32",
        "prefill": 3,
        "decode": 4,
        "mixed": 5,
        "ray_address": "host:6379",
        "ready_file": "ready.json",
        "drain_grace": 7,
        "transport": "tcp",
        "host": "0.0.0.0",
        "grpc_port": 0,
        "pool_blocks": 8,
        "threads": 9,
        "redis_url": "redis://host",
    }
    assert flags.keys() == PATHS.keys()
    mapping = to_mapping(serve_config(None, flags))
    for flag, value in flags.items():
        found = mapping
        for key in PATHS[flag]:
            found = found[key]
        assert found == value, flag


def test_flags_win_over_the_file(toml: Path) -> None:
    config = serve_config(toml, {"model": "from-flag", "grpc_port": 0, "decode": None})
    assert (config.model, config.prefill, config.decode) == ("from-flag", 2, 1)
    assert (config.engine.pool_blocks, config.router.grpc_port) == (77, 0)


def test_mixed_alone_is_an_aggregated_cluster() -> None:
    config = serve_config(None, {"mixed": 2})
    assert (config.prefill, config.decode, config.mixed) == (0, 0, 2)


def test_mixed_beside_other_counts_changes_none_of_them(toml: Path) -> None:
    assert serve_config(None, {"mixed": 1, "prefill": 1}).decode == 1
    assert serve_config(toml, {"mixed": 1}).prefill == 2


def test_a_wrong_flag_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match="dtype"):
        serve_config(None, {"dtype": "int3"})


def test_a_missing_file_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no configuration file"):
        serve_config(tmp_path / "absent.toml", {})
