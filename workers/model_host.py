"""What a worker loads before it can serve: weights, tokenizer, KV memory."""

from dataclasses import dataclass
from pathlib import Path

import torch

from pdserve.core.catalog import resolve_model
from pdserve.core.text.tokenizer import Tokenizer
from pdserve.kvtransfer.names import LogicalSchema
from pdserve.kvtransfer.pool.layout import KvLayout
from pdserve.kvtransfer.pool.storage import KvStorage
from pdserve.workers.engine.constraint import ConstraintCompiler
from pdserve.workers.models.available_memory import available_memory
from pdserve.workers.models.decoder import Decoder
from pdserve.workers.models.digest import weights_digest
from pdserve.workers.models.footprint import footprint, require_memory
from pdserve.workers.models.load_config import load_config
from pdserve.workers.models.tokenizer_match import check_tokenizer
from pdserve.workers.spec import WorkerSpec

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class ModelHost:
    """One loaded model and the pool memory that fits it."""

    path: Path
    decoder: Decoder
    tokenizer: Tokenizer
    storage: KvStorage
    schema: bytes
    """Digest of the logical schema."""
    constraints: ConstraintCompiler

    @classmethod
    def load(cls, spec: WorkerSpec) -> "ModelHost":
        """Takes seconds: call it in a thread.

        Raises ConfigError for files that are wrong, and for what does not fit in memory.
        """
        path = resolve_model(spec.model)
        torch.set_num_threads(spec.engine.threads)
        expected = load_config(path)
        tokenizer = Tokenizer.load(path)
        check_tokenizer(expected, tokenizer, path)
        need = footprint(expected, spec.dtype, spec.engine.pool_blocks)
        require_memory(need, _available_on(spec.engine.device), model=spec.model)
        decoder = Decoder.load(path, _DTYPES[spec.dtype], spec.engine.device)
        config = decoder.config
        layout = KvLayout(config.num_layers, config.num_kv_heads, config.head_dim, spec.dtype)
        schema = LogicalSchema(
            model=config.architecture,
            weights_digest=weights_digest(path),
            num_layers=config.num_layers,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
        )
        return cls(
            path=path,
            decoder=decoder,
            tokenizer=tokenizer,
            storage=KvStorage(layout, spec.engine.pool_blocks, spec.engine.device),
            schema=schema.digest(),
            constraints=ConstraintCompiler(tokenizer.to_json(), config.vocab_size, tokenizer.eos_ids),
        )


def _available_on(device: str) -> int:
    """Bytes that the process may still take where weights and pool will be."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return available_memory()
