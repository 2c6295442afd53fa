"""ModelConfig from the metadata of a GGUF file."""

from pathlib import Path
from typing import TypeVar

from pdserve.core.errors import ConfigError
from pdserve.core.gguf_header import GgufHeader
from pdserve.workers.models.config import (
    LayerKind,
    ModelConfig,
    check_size,
    check_special_ids,
    own_window,
    unsupported,
)
from pdserve.workers.models.families import GEMMA2, GEMMA3, GGUF_FAMILIES, SMOLLM3, Family
from pdserve.workers.models.rope_scaling import LinearScaling, Rope

T = TypeVar("T")

_EOS_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
_NO_ROPE_INTERVAL = 4
"""SmolLM3's, which the format does not carry."""
_WINDOW_PATTERN = {GEMMA2: 2, GEMMA3: 6}
"""Every so many layers one is without the window; the others have it. The same."""
_LOCAL_THETA = 10000.0
_SCALE_BY_WIDTH = {GEMMA2: 46, GEMMA3: 62}
"""Layers of the family's 27B model, which scales scores by hidden_size / heads, not head_dim. The same."""


class _Required:
    """A header whose scalars must be there unless there is a default; keys are those of one architecture."""

    def __init__(self, header: GgufHeader, arch: str) -> None:
        self.header = header
        self.file = header.path
        self.arch = arch

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.header.integer(f"{self.arch}.{key}")
        return self._given(key, default if value is None else value)

    def number(self, key: str, default: float | None = None) -> float:
        value = self.header.number(f"{self.arch}.{key}")
        return float(self._given(key, default if value is None else value))

    def optional(self, key: str, default: float | None = None) -> float | None:
        value = self.header.number(f"{self.arch}.{key}")
        return default if value is None else value

    def _given(self, key: str, value: T | None) -> T:
        if value is None:
            raise ConfigError(f"{self.file}: metadata key {self.arch}.{key} is missing")
        return value


def config_from_gguf(header: GgufHeader) -> ModelConfig:
    """The configuration of the model in the file.

    Whether there are biases and an own output matrix is told by the tensors, not by metadata.

    Raises:
        ConfigError: metadata incomplete, or a model that this decoder does not compute.
    """
    arch = header.string("general.architecture")
    if arch not in GGUF_FAMILIES:
        raise unsupported(header.path, f"GGUF architecture {arch!r}")
    family, data, file = GGUF_FAMILIES[arch], _Required(header, arch), header.path
    shapes = {tensor.name: tensor.shape for tensor in header.tensors}
    hidden_size = data.integer("embedding_length")
    num_heads = data.integer("attention.head_count")
    if num_heads < 1:
        raise ConfigError(f"{file}: {arch}.attention.head_count is {num_heads}, must be at least 1")
    head_dim = data.integer("attention.key_length", hidden_size // num_heads)
    check_size(file, "head_dim", head_dim)
    _refuse_what_we_do_not_compute(data, head_dim)
    vocab_size = _vocab_size(shapes, file)
    ends = _eos_token_ids(header)
    check_special_ids(file, vocab_size, {"eos_token_id": ends})
    layers = _layers(data, family)
    by_width = _SCALE_BY_WIDTH.get(family) == len(layers)
    return ModelConfig(
        family=family,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=data.integer("feed_forward_length"),
        num_heads=num_heads,
        num_kv_heads=data.integer("attention.head_count_kv", num_heads),
        head_dim=head_dim,
        layers=layers,
        rms_norm_eps=data.number("attention.layer_norm_rms_epsilon"),
        max_position_embeddings=data.integer("context_length"),
        tie_word_embeddings="output.weight" not in shapes,
        attention_bias="blk.0.attn_q.bias" in shapes,
        output_bias="blk.0.attn_output.bias" in shapes,
        mlp_bias="blk.0.ffn_gate.bias" in shapes,
        attention_scale=float((hidden_size / num_heads if by_width else head_dim) ** -0.5),
        attention_soft_cap=data.optional("attn_logit_softcapping", 50.0) if family is GEMMA2 else None,
        final_soft_cap=data.optional("final_logit_softcapping", 30.0 if family is GEMMA2 else None),
        bos_token_id=header.integer("tokenizer.ggml.bos_token_id"),
        eos_token_ids=ends,
    )


def _layers(data: _Required, family: Family) -> tuple[LayerKind, ...]:
    """What llama.cpp knows of the architecture by heart, with what the file says."""
    count, context = data.integer("block_count"), data.integer("context_length")
    check_size(data.file, "num_layers", count)
    rope = Rope(data.number("rope.freq_base", 10000.0), _scaling(data))
    local = Rope(data.number("rope.freq_base_swa", _LOCAL_THETA)) if family is GEMMA3 else rope
    # llama3 scaling travels as the tensor rope_freqs.weight.
    pattern = _WINDOW_PATTERN.get(family)
    said = data.integer("attention.sliding_window", 4096 if family is GEMMA2 else 0)
    window = own_window(said or None, context)
    if window is not None and pattern is None:
        raise unsupported(
            data.file, f"a sliding window of {window} tokens, smaller than the context of {context},"
        )
    kinds = []
    for number in range(1, count + 1):
        slides = pattern is not None and number % pattern != 0
        turns = family is not SMOLLM3 or number % _NO_ROPE_INTERVAL != 0
        chosen = local if slides else rope
        kinds.append(LayerKind(chosen if turns else None, window if slides else None))
    return tuple(kinds)


def _scaling(data: _Required) -> LinearScaling | None:
    kind = data.header.string(f"{data.arch}.rope.scaling.type")
    if kind in (None, "none"):
        return None
    if kind == "linear":
        return LinearScaling(data.number("rope.scaling.factor"))
    raise unsupported(data.file, f"{data.arch}.rope.scaling.type {kind!r}")


def _refuse_what_we_do_not_compute(data: _Required, head_dim: int) -> None:
    if (data.header.integer("split.count") or 1) > 1:
        raise unsupported(data.file, "a split GGUF (join it with llama-gguf-split --merge)")
    if data.integer("expert_count", 0) > 0:
        raise unsupported(data.file, "a mixture of experts")
    for key in ("rope.dimension_count", "attention.value_length"):
        if data.integer(key, head_dim) != head_dim:
            raise unsupported(data.file, f"{data.arch}.{key} other than the key length {head_dim}")


def _vocab_size(shapes: dict[str, tuple[int, ...]], file: Path) -> int:
    """Rows of the embedding: metadata may name fewer or leave it out. GGUF shapes are innermost first."""
    embedding = shapes.get("token_embd.weight")
    if embedding is None or len(embedding) != 2:
        raise ConfigError(f"{file}: token_embd.weight is missing or not a matrix: download the model again")
    return embedding[1]


def _eos_token_ids(header: GgufHeader) -> tuple[int, ...]:
    found = (header.integer(f"tokenizer.ggml.{key}") for key in _EOS_KEYS)
    return tuple(dict.fromkeys(token for token in found if token is not None))
