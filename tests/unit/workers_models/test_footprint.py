"""What a model needs in memory is what the decoder takes, and too little is refused with the numbers."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from decoder_oracle import family, saved
from tiny_families import FAMILIES

from pdserve.core.config import EngineConfig, ServeConfig
from pdserve.core.errors import ConfigError
from pdserve.kvtransfer.pool.layout import KvLayout
from pdserve.kvtransfer.pool.storage import KvStorage
from pdserve.workers.models import fit
from pdserve.workers.models.available_memory import available_memory
from pdserve.workers.models.decoder import Decoder
from pdserve.workers.models.fit import require_fit
from pdserve.workers.models.footprint import PROCESS_BYTES, Footprint, footprint, require_memory
from pdserve.workers.models.weights import DecoderWeights, Linear

NEED = Footprint("float32", weight_bytes=2 * 10**9, kv_block_bytes=10**6, pool_blocks=1000)


def held_bytes(value: object) -> int:
    """Of every distinct tensor in a tree of dataclasses and tuples."""
    found: dict[int, int] = {}

    def visit(node: object) -> None:
        if isinstance(node, torch.Tensor):
            found[node.data_ptr()] = node.nbytes
        elif isinstance(node, tuple | Linear):
            for child in node if isinstance(node, tuple) else (node.weight, node.bias):
                visit(child)
        elif dataclasses.is_dataclass(node):
            for field in dataclasses.fields(node):
                visit(getattr(node, field.name))

    visit(value)
    return sum(found.values())


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_the_estimate_is_what_decoder_and_pool_hold(tmp_path: Path, name: str) -> None:
    folder = saved(family(name), tmp_path)
    for dtype, torch_dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        decoder = Decoder.load(folder, torch_dtype)
        config, weights = decoder.config, decoder._weights
        assert isinstance(weights, DecoderWeights)
        need = footprint(config, dtype, pool_blocks=7)
        assert need.weight_bytes == held_bytes(weights)
        storage = KvStorage(KvLayout(config.num_layers, config.num_kv_heads, config.head_dim, dtype), 7)
        assert need.pool_bytes == storage.tensor.nbytes
        assert need.kv_token_bytes * 16 == need.kv_block_bytes
        storage.close()


def test_what_just_fits_is_accepted_and_one_byte_less_is_not() -> None:
    total = 3 * 10**9 + PROCESS_BYTES
    require_memory(NEED, total, model="m")
    require_memory(NEED, 2 * total, model="m", workers=2)
    with pytest.raises(ConfigError, match="m does not fit in memory"):
        require_memory(NEED, total - 1, model="m")


def test_the_refusal_says_needed_available_and_what_lowers_it() -> None:
    with pytest.raises(ConfigError) as caught:
        require_memory(NEED, 6 * 10**9, model="m", workers=2)
    said = caught.value.message
    assert "2 workers in float32 need 7.07 GB, each 2.00 GB of weights, 1.00 GB of KV (1000 blocks" in said
    assert "6.00 GB are available" in said
    assert "--dtype bfloat16" in said
    assert "fewer workers" in said
    found = re.search(r"--pool-blocks (\d+) or fewer", said)
    assert found is not None
    blocks = int(found[1])
    require_memory(dataclasses.replace(NEED, pool_blocks=blocks), 6 * 10**9, model="m", workers=2)
    with pytest.raises(ConfigError):
        require_memory(dataclasses.replace(NEED, pool_blocks=blocks + 1), 6 * 10**9, model="m", workers=2)


def test_weights_alone_too_large_name_no_number_of_blocks() -> None:
    with pytest.raises(ConfigError) as caught:
        require_memory(dataclasses.replace(NEED, dtype="bfloat16"), 10**9, model="m")
    assert "what lowers it: a smaller model" in caught.value.message


def test_a_cluster_is_refused_where_its_workers_fit_only_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(family("qwen3"), tmp_path)
    config = ServeConfig(model=str(tmp_path), engine=EngineConfig(pool_blocks=8), prefill=2, decode=3)
    monkeypatch.setattr(fit, "available_memory", lambda: 6 * PROCESS_BYTES)
    require_fit(config)
    monkeypatch.setattr(fit, "available_memory", lambda: 3 * PROCESS_BYTES)
    with pytest.raises(ConfigError, match="5 workers in float32 need"):
        require_fit(config)
    require_fit(dataclasses.replace(config, ray_address="10.0.0.1:6379"))  # they start elsewhere


def written(root: Path, files: dict[str, str]) -> Path:
    for name, text in {"proc/meminfo": "MemTotal: 900 kB\nMemAvailable:  100 kB\n", **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


V2 = "sys/fs/cgroup/"
V1 = "sys/fs/cgroup/memory/"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 102400),
        ({V2 + "memory.max": "max\n", V2 + "memory.current": "5\n", V2 + "memory.stat": ""}, 102400),
        (
            {
                V2 + "memory.max": "9000\n",
                V2 + "memory.current": "5000\n",
                V2 + "memory.stat": "anon 1\ninactive_file 700\n",
            },
            4700,
        ),
        ({V2 + "memory.max": "9\n", V2 + "memory.current": "50\n", V2 + "memory.stat": ""}, 0),
        (
            {
                V1 + "memory.limit_in_bytes": "8000\n",
                V1 + "memory.usage_in_bytes": "5000\n",
                V1 + "memory.stat": "total_inactive_file 10\n",
            },
            3010,
        ),
        (
            {
                V1 + "memory.limit_in_bytes": "9223372036854771712\n",
                V1 + "memory.usage_in_bytes": "5000\n",
                V1 + "memory.stat": "",
            },
            102400,
        ),
    ],
    ids=["machine", "v2 without limit", "v2", "v2 over its limit", "v1", "v1 without limit"],
)
def test_the_smallest_of_machine_and_control_group_is_available(
    tmp_path: Path, files: dict[str, str], expected: int
) -> None:
    assert available_memory(written(tmp_path, files)) == expected
