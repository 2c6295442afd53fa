"""What a model's files hold and need: the answer of `pdserve models`."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pdserve.core.catalog import resolve_model
from pdserve.core.config import DTYPES
from pdserve.core.text.tokenizer import Tokenizer
from pdserve.workers.models.available_memory import available_memory
from pdserve.workers.models.checkpoint import open_checkpoint
from pdserve.workers.models.config import ModelConfig
from pdserve.workers.models.footprint import Footprint, footprint
from pdserve.workers.models.tokenizer_match import check_tokenizer
from pdserve.workers.models.weights import check_tensors


@dataclass(frozen=True, slots=True)
class SourceType:
    """The tensors of one element type in the files."""

    kind: str
    tensors: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class ModelReport:
    """A model that this program can serve, if there is memory for it."""

    model: str
    path: Path
    config: ModelConfig
    source_types: tuple[SourceType, ...]
    files: tuple[tuple[str, int], ...]
    """Names and bytes of the files with weights."""
    tokenizer_ids: int
    tokenizer_digest: str
    chat_template: bool
    needs: tuple[Footprint, ...]
    """Of one worker, per dtype."""
    available_bytes: int

    @property
    def file_bytes(self) -> int:
        return sum(size for _, size in self.files)

    def fits(self, need: Footprint) -> bool:
        return need.total_bytes <= self.available_bytes

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; sizes in bytes."""
        config = self.config
        windows = sorted({layer.window for layer in config.layers if layer.window is not None})
        return {
            "model": self.model,
            "path": str(self.path),
            "architecture": config.architecture,
            "layers": config.num_layers,
            "heads": config.num_heads,
            "kv_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
            "hidden_size": config.hidden_size,
            "vocabulary": config.vocab_size,
            "context_tokens": config.max_position_embeddings,
            "sliding_windows": windows,
            "source_types": {t.kind: {"tensors": t.tensors, "bytes": t.num_bytes} for t in self.source_types},
            "files": dict(self.files),
            "file_bytes": self.file_bytes,
            "chat_template": self.chat_template,
            "tokenizer_ids": self.tokenizer_ids,
            "tokenizer_digest": self.tokenizer_digest,
            "available_bytes": self.available_bytes,
            "memory": {
                need.dtype: {
                    "weight_bytes": need.weight_bytes,
                    "kv_bytes_per_token": need.kv_token_bytes,
                    "kv_bytes_per_block": need.kv_block_bytes,
                    "pool_blocks": need.pool_blocks,
                    "pool_bytes": need.pool_bytes,
                    "total_bytes": need.total_bytes,
                    "fits": self.fits(need),
                }
                for need in self.needs
            },
        }


def describe(model: str, pool_blocks: int) -> ModelReport:
    """Read headers, configuration and tokenizer of what `model` means; weights are not read.

    Raises:
        ConfigError: whatever would keep a worker from loading it, but memory.
    """
    path = resolve_model(model)
    checkpoint = open_checkpoint(path)
    config, stored = checkpoint.config, list(checkpoint.stored())
    check_tensors(config, ((tensor.name, tensor.shape) for tensor in stored), path)
    tokenizer = Tokenizer.load(path)
    check_tokenizer(config, tokenizer, path)
    count: Counter[str] = Counter(tensor.kind for tensor in stored)
    sizes: Counter[str] = Counter()
    for tensor in stored:
        sizes[tensor.kind] += tensor.num_bytes
    return ModelReport(
        model=model,
        path=path,
        config=config,
        source_types=tuple(SourceType(kind, count[kind], size) for kind, size in sizes.most_common()),
        files=tuple((file.name, file.stat().st_size) for file in checkpoint.files),
        tokenizer_ids=tokenizer.vocab_size,
        tokenizer_digest=tokenizer.digest(),
        chat_template=tokenizer.has_chat_template,
        needs=tuple(footprint(config, dtype, pool_blocks) for dtype in DTYPES),
        available_bytes=available_memory(),
    )
