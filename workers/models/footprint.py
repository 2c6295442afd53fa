"""What a worker with a model needs in memory, in bytes, and whether it is there. No torch."""

from dataclasses import dataclass

from pdserve.core.errors import ConfigError
from pdserve.core.types import BLOCK_TOKENS
from pdserve.kvtransfer.pool.layout import KvLayout
from pdserve.workers.models.config import ModelConfig

PROCESS_BYTES = 512 << 20
"""Of a worker process beside weights and pool: interpreter, libraries and a step's activations."""
_ITEM_BYTES = {"float32": 4, "bfloat16": 2}
_GB = 1e9


@dataclass(frozen=True, slots=True)
class Footprint:
    """One worker's memory, once its pool is full."""

    dtype: str
    weight_bytes: int
    kv_block_bytes: int
    pool_blocks: int

    @property
    def kv_token_bytes(self) -> int:
        return self.kv_block_bytes // BLOCK_TOKENS

    @property
    def pool_bytes(self) -> int:
        return self.pool_blocks * self.kv_block_bytes

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.pool_bytes + PROCESS_BYTES


def footprint(config: ModelConfig, dtype: str, pool_blocks: int) -> Footprint:
    """Weights, merged and tied as the decoder holds them, and a pool of so many blocks."""
    layout = KvLayout(config.num_layers, config.num_kv_heads, config.head_dim, dtype)
    return Footprint(dtype, _weight_bytes(config, _ITEM_BYTES[dtype]), layout.block_bytes, pool_blocks)


def require_memory(need: Footprint, available_bytes: int, *, model: str, workers: int = 1) -> None:
    """Refuse what would be killed by the kernel later.

    Raises:
        ConfigError: `workers` of them do not fit in `available_bytes`; says by how much and what lowers it.
    """
    needed = workers * need.total_bytes
    if needed <= available_bytes:
        return
    blocks = (available_bytes // workers - need.weight_bytes - PROCESS_BYTES) // need.kv_block_bytes
    ways = [f"--pool-blocks {blocks} or fewer"] if blocks >= 1 else []
    ways += ["--dtype bfloat16"] if need.dtype == "float32" else []
    ways += ["fewer workers (--prefill, --decode, --mixed)"] if workers > 1 else []
    ways += ["a smaller model"]
    raise ConfigError(
        f"{model} does not fit in memory: {workers} worker{'s' * (workers > 1)} in {need.dtype} need "
        f"{needed / _GB:.2f} GB, each {need.weight_bytes / _GB:.2f} GB of weights, "
        f"{need.pool_bytes / _GB:.2f} GB of KV ({need.pool_blocks} blocks of {need.kv_block_bytes} bytes) "
        f"and {PROCESS_BYTES / _GB:.2f} GB of process, but {available_bytes / _GB:.2f} GB are available; "
        f"what lowers it: {', '.join(ways)}"
    )


def _weight_bytes(config: ModelConfig, item_bytes: int) -> int:
    matrices, norms = _values(config)
    return matrices * item_bytes + norms * (4 if config.family.norm_offset else item_bytes)


def _values(config: ModelConfig) -> tuple[int, int]:
    """Numbers in matrices with their biases, and in norms."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    qkv_rows = q_rows + 2 * kv_rows
    layer = qkv_rows * hidden + hidden * q_rows + 3 * inner * hidden
    layer += config.attention_bias * qkv_rows + config.output_bias * hidden
    layer += config.mlp_bias * (2 * inner + hidden)
    embeddings = (1 if config.tie_word_embeddings else 2) * config.vocab_size * hidden
    layer_norms = (4 if config.family.output_norms else 2) * hidden
    layer_norms += config.family.query_key_norm * (q_rows + kv_rows)
    return embeddings + config.num_layers * layer, config.num_layers * layer_norms + hidden
