from pathlib import Path

import pytest

from pdserve.cli.serve_flags import SERVE_FLAGS, resolve_flags
from pdserve.core.config import ServeConfig
from pdserve.core.config_sources import SourceKind
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
    assert resolve_flags(None, dict.fromkeys(flag.name for flag in SERVE_FLAGS)).config == ServeConfig()


def test_every_flag_names_one_value_of_its_own() -> None:
    keys = [flag.key for flag in SERVE_FLAGS]
    assert set(keys) <= set(resolve_flags(None, {}).sources)
    assert len(set(keys)) == len(keys) == len({flag.name for flag in SERVE_FLAGS})


def test_flags_win_over_the_file(toml: Path) -> None:
    resolved = resolve_flags(toml, {"model": "from-flag", "grpc_port": 0, "decode": None})
    config = resolved.config
    assert (config.model, config.prefill, config.decode) == ("from-flag", 2, 1)
    assert (config.engine.pool_blocks, config.router.grpc_port) == (77, 0)
    assert str(resolved.sources["router.grpc_port"]) == "--grpc-port"
    assert str(resolved.sources["engine.pool_blocks"]) == f"{toml}:5"


def test_mixed_alone_is_an_aggregated_cluster() -> None:
    resolved = resolve_flags(None, {"mixed": 2})
    config = resolved.config
    assert (config.prefill, config.decode, config.mixed) == (0, 0, 2)
    assert resolved.sources["prefill"].kind is SourceKind.FLAG


def test_mixed_beside_other_counts_changes_none_of_them(toml: Path) -> None:
    assert resolve_flags(None, {"mixed": 1, "prefill": 1}).config.decode == 1
    assert resolve_flags(toml, {"mixed": 1}).config.prefill == 2


def test_a_wrong_flag_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match=r"^--dtype: dtype is 'int3'"):
        resolve_flags(None, {"dtype": "int3"})
