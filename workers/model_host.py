"""What a worker loads before it can serve: weights, tokenizer, KV memory."""

from dataclasses import dataclass
from pathlib import Path

import torch

from pdserve.core.catalog import resolve_model
from pdserve.core.text.tokenizer import Tokenizer
from pdserve.kvtransfer.names import LogicalSchema
from pdserve.kvtransfer.pool.layout import KvLayout
from pdserve.kvtransfer.pool.storage import KvStorage
from pdserve.workers.models.decoder import Decoder
from pdserve.workers.models.digest import weights_digest
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

    @classmethod
    def load(cls, spec: WorkerSpec) -> "ModelHost":
        """Takes seconds: call it in a thread. Raises ConfigError for files that are wrong."""
        path = resolve_model(spec.model)
        torch.set_num_threads(spec.engine.threads)
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
            tokenizer=Tokenizer.load(path),
            storage=KvStorage(layout, spec.engine.pool_blocks, spec.engine.device),
            schema=schema.digest(),
        )
