"""ModelConfig from a Hugging Face folder: config.json and, if present, generation_config.json."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pdserve.core.errors import ConfigError
from pdserve.workers.models.config import (
    SUPPORTED_ARCHITECTURES,
    Llama3RopeScaling,
    ModelConfig,
    unsupported,
)

_DEFAULT_ROPE_THETA = 10000.0


class _Fields:
    """Typed reads of a JSON object; null counts as absent, as in transformers."""

    def __init__(self, raw: Mapping[str, Any], source: Path) -> None:
        self._raw = raw
        self.source = source

    def get(self, key: str) -> Any:
        return self._raw.get(key)

    def has(self, key: str) -> bool:
        return key in self._raw

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(f"{self.source}: {key} is {value!r}, must be an integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"{self.source}: {key} is {value!r}, must be a number")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise ConfigError(f"{self.source}: {key} is {value!r}, must be true or false")
        return value

    def section(self, key: str) -> "_Fields":
        """A nested object; an absent one reads as empty."""
        value = self._raw.get(key)
        if value is not None and not isinstance(value, dict):
            raise ConfigError(f"{self.source}: {key} is {value!r}, must be an object")
        return _Fields(value or {}, self.source)

    def token_ids(self, key: str) -> tuple[int, ...]:
        value = self._raw.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
            raise ConfigError(f"{self.source}: {key} is {value!r}, must be a token id or a list of them")
        return tuple(ids)

    def _value(self, key: str, default: object) -> Any:
        value = self._raw.get(key)
        if value is not None:
            return value
        if default is None:
            raise ConfigError(f"{self.source}: {key} is missing")
        return default


def config_from_folder(folder: Path) -> ModelConfig:
    """Read `folder/config.json`. `eos_token_id` of generation_config.json wins, as in `generate()`.

    Raises:
        ConfigError: unreadable, incomplete, or a model that this decoder does not compute.
    """
    fields = _read_json(folder / "config.json")
    architecture = _architecture(fields)
    _refuse_what_we_do_not_compute(fields, architecture)
    num_heads = fields.integer("num_attention_heads")
    hidden_size = fields.integer("hidden_size")
    if num_heads < 1 or (fields.get("head_dim") is None and hidden_size % num_heads):
        raise ConfigError(
            f"{fields.source}: hidden_size {hidden_size} does not divide into {num_heads} heads"
        )
    llama = architecture == "LlamaForCausalLM"
    llama_bias = llama and fields.boolean("attention_bias", False)
    bos = fields.token_ids("bos_token_id")
    max_positions = fields.integer("max_position_embeddings")
    theta, scaling = _rope(fields, max_positions)
    return ModelConfig(
        architecture=architecture,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=fields.integer("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=fields.integer("num_key_value_heads", num_heads),
        head_dim=fields.integer("head_dim", hidden_size // num_heads),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        max_position_embeddings=max_positions,
        tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
        attention_bias=llama_bias or architecture == "Qwen2ForCausalLM",
        output_bias=llama_bias,
        mlp_bias=llama and fields.boolean("mlp_bias", False),
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=_eos_token_ids(folder, fields),
    )


def _read_json(path: Path) -> _Fields:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds no JSON object")
    return _Fields(raw, path)


def _architecture(fields: _Fields) -> str:
    names = fields.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or names[0] not in SUPPORTED_ARCHITECTURES:
        raise unsupported(fields.source, f"architectures {names!r}")
    return str(names[0])


def _refuse_what_we_do_not_compute(fields: _Fields, architecture: str) -> None:
    source = fields.source
    if fields.get("hidden_act") not in (None, "silu"):
        raise unsupported(source, f"hidden_act {fields.get('hidden_act')!r}")
    if fields.get("quantization_config") is not None:
        raise unsupported(source, "a quantization_config")
    # Mistral's window has a default: only an explicit null means full attention.
    if architecture == "MistralForCausalLM" and (
        not fields.has("sliding_window") or fields.get("sliding_window") is not None
    ):
        raise unsupported(source, f"sliding_window {fields.get('sliding_window') or 'by default'}")
    if architecture == "Qwen2ForCausalLM" and fields.boolean("use_sliding_window", False):
        raise unsupported(source, "use_sliding_window true")
    for owner in (fields, fields.section("rope_parameters"), fields.section("rope_scaling")):
        if owner.number("partial_rotary_factor", 1.0) != 1.0:
            raise unsupported(source, f"partial_rotary_factor {owner.get('partial_rotary_factor')}")


def _rope(fields: _Fields, max_positions: int) -> tuple[float, Llama3RopeScaling | None]:
    """Theta and scaling, from transformers 5 (`rope_parameters`) or 4 (`rope_theta`, `rope_scaling`)."""
    rope = fields.section("rope_parameters" if fields.get("rope_parameters") is not None else "rope_scaling")
    theta = rope.number("rope_theta", fields.number("rope_theta", _DEFAULT_ROPE_THETA))
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise unsupported(fields.source, f"rope type {kind!r}")
    return theta, Llama3RopeScaling(
        factor=rope.number("factor"),
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
        original_max_position_embeddings=rope.integer("original_max_position_embeddings", max_positions),
    )


def _eos_token_ids(folder: Path, fields: _Fields) -> tuple[int, ...]:
    generation = folder / "generation_config.json"
    if generation.is_file():
        ids = _read_json(generation).token_ids("eos_token_id")
        if ids:
            return ids
    return fields.token_ids("eos_token_id")
