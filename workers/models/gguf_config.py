"""ModelConfig from the metadata of a GGUF file."""

from pathlib import Path
from typing import TypeVar

from pdserve.core.errors import ConfigError
from pdserve.core.gguf_header import GgufHeader
from pdserve.workers.models.config import ModelConfig, unsupported

_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
T = TypeVar("T")

_EOS_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")


class _Required:
    """A header whose scalars must be there unless there is a default."""

    def __init__(self, header: GgufHeader) -> None:
        self.header = header
        self.file = header.path

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.header.integer(key)
        return self._given(key, default if value is None else value)

    def number(self, key: str, default: float | None = None) -> float:
        value = self.header.number(key)
        return float(self._given(key, default if value is None else value))

    def _given(self, key: str, value: T | None) -> T:
        if value is None:
            raise ConfigError(f"{self.file}: metadata key {key} is missing")
        return value


def config_from_gguf(header: GgufHeader) -> ModelConfig:
    """The configuration of the model in the file.

    Whether there are biases and an own output matrix is told by the tensors, not by metadata.

    Raises:
        ConfigError: metadata incomplete, or a model that this decoder does not compute.
    """
    data, file = _Required(header), header.path
    arch = header.string("general.architecture")
    if arch not in _ARCHITECTURES:
        raise unsupported(file, f"GGUF architecture {arch!r}")
    shapes = {tensor.name: tensor.shape for tensor in header.tensors}
    hidden_size = data.integer(f"{arch}.embedding_length")
    num_heads = data.integer(f"{arch}.attention.head_count")
    if num_heads < 1:
        raise ConfigError(f"{file}: {arch}.attention.head_count is {num_heads}, must be at least 1")
    head_dim = data.integer(f"{arch}.attention.key_length", hidden_size // num_heads)
    _refuse_what_we_do_not_compute(data, arch, head_dim)
    return ModelConfig(
        architecture=_ARCHITECTURES[arch],
        vocab_size=_vocab_size(shapes, file),
        hidden_size=hidden_size,
        intermediate_size=data.integer(f"{arch}.feed_forward_length"),
        num_layers=data.integer(f"{arch}.block_count"),
        num_heads=num_heads,
        num_kv_heads=data.integer(f"{arch}.attention.head_count_kv", num_heads),
        head_dim=head_dim,
        rms_norm_eps=data.number(f"{arch}.attention.layer_norm_rms_epsilon"),
        rope_theta=data.number(f"{arch}.rope.freq_base", 10000.0),
        rope_scaling=None,  # llama3 scaling travels as the tensor rope_freqs.weight
        max_position_embeddings=data.integer(f"{arch}.context_length"),
        tie_word_embeddings="output.weight" not in shapes,
        attention_bias="blk.0.attn_q.bias" in shapes,
        output_bias="blk.0.attn_output.bias" in shapes,
        mlp_bias="blk.0.ffn_gate.bias" in shapes,
        bos_token_id=header.integer("tokenizer.ggml.bos_token_id"),
        eos_token_ids=_eos_token_ids(header),
    )


def _refuse_what_we_do_not_compute(data: _Required, arch: str, head_dim: int) -> None:
    if data.integer("split.count", 1) > 1:
        raise unsupported(data.file, "a split GGUF (join it with llama-gguf-split --merge)")
    if data.integer(f"{arch}.expert_count", 0) > 0:
        raise unsupported(data.file, "a mixture of experts")
    scaling = data.header.string(f"{arch}.rope.scaling.type")
    if scaling not in (None, "none"):
        raise unsupported(data.file, f"{arch}.rope.scaling.type {scaling!r}")
    for key in ("rope.dimension_count", "attention.value_length"):
        if data.integer(f"{arch}.{key}", head_dim) != head_dim:
            raise unsupported(data.file, f"{arch}.{key} other than the key length {head_dim}")
    if data.header.has(f"{arch}.attention.sliding_window"):
        raise unsupported(data.file, "a sliding window")


def _vocab_size(shapes: dict[str, tuple[int, ...]], file: Path) -> int:
    """Rows of the embedding: metadata may name fewer or leave it out. GGUF shapes are innermost first."""
    embedding = shapes.get("token_embd.weight")
    if embedding is None or len(embedding) != 2:
        raise ConfigError(f"{file}: token_embd.weight is missing or not a matrix")
    return embedding[1]


def _eos_token_ids(header: GgufHeader) -> tuple[int, ...]:
    found = (header.integer(f"tokenizer.ggml.{key}") for key in _EOS_KEYS)
    return tuple(dict.fromkeys(token for token in found if token is not None))
