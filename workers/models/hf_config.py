"""ModelConfig from a Hugging Face folder: config.json and, if present, generation_config.json."""

from pathlib import Path

from pdserve.core.errors import ConfigError
from pdserve.workers.models.config import ModelConfig, check_size, check_special_ids, unsupported
from pdserve.workers.models.families import (
    FAMILIES,
    GEMMA,
    GEMMA2,
    GEMMA3,
    Activation,
    Family,
)
from pdserve.workers.models.hf_layers import layers_of
from pdserve.workers.models.json_fields import JsonFields


def config_from_folder(folder: Path) -> ModelConfig:
    """Read `folder/config.json`. `eos_token_id` of generation_config.json wins, as in `generate()`.

    Raises:
        ConfigError: unreadable, incomplete, or a model that this decoder does not compute.
    """
    fields = JsonFields.read(folder / "config.json")
    family = _family(fields)
    _refuse_what_we_do_not_compute(fields, family)
    num_heads, head_dim = _heads(fields, family)
    context = fields.integer("max_position_embeddings")
    layers = fields.integer("num_hidden_layers")
    check_size(fields.source, "num_layers", layers)
    biased = family.attention_bias_key and fields.boolean("attention_bias", False)
    vocab_size = fields.integer("vocab_size")
    bos = fields.token_ids("bos_token_id")
    ends_source, ends = _eos_token_ids(folder, fields)
    if vocab_size > 0:
        check_special_ids(ends_source, vocab_size, {"eos_token_id": ends})
    return ModelConfig(
        family=family,
        vocab_size=vocab_size,
        hidden_size=fields.integer("hidden_size"),
        intermediate_size=fields.integer("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=fields.integer("num_key_value_heads", num_heads),
        head_dim=head_dim,
        layers=layers_of(fields, family, layers, context),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        max_position_embeddings=context,
        tie_word_embeddings=fields.boolean("tie_word_embeddings", family.tied_by_default),
        attention_bias=biased or family.qkv_bias,
        output_bias=biased,
        mlp_bias=family.mlp_bias_key and fields.boolean("mlp_bias", False),
        attention_scale=_attention_scale(fields, family, head_dim),
        attention_soft_cap=_soft_cap(fields, family, "attn_logit_softcapping", 50.0),
        final_soft_cap=_soft_cap(fields, family, "final_logit_softcapping", 30.0),
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=ends,
    )


def _family(fields: JsonFields) -> Family:
    names = fields.get("architectures")
    name = names[0] if isinstance(names, list) and len(names) == 1 else None
    if not isinstance(name, str) or name not in FAMILIES:
        raise unsupported(fields.source, f"architectures {names!r}")
    return FAMILIES[name]


def _refuse_what_we_do_not_compute(fields: JsonFields, family: Family) -> None:
    source = fields.source
    key = "hidden_activation" if family in (GEMMA2, GEMMA3) else "hidden_act"
    named = fields.get(key)
    # Gemma's first configurations say gelu and mean its tanh form.
    known = (None, str(family.activation), *(("gelu",) if family is GEMMA else ()))
    if named not in known:
        raise unsupported(source, f"{key} {named!r}")
    if fields.get("quantization_config") is not None:
        raise unsupported(source, "a quantization_config")
    if family.activation is Activation.GELU_TANH and fields.boolean("use_bidirectional_attention", False):
        raise unsupported(source, "use_bidirectional_attention true")


def _heads(fields: JsonFields, family: Family) -> tuple[int, int]:
    """Heads, and the size of each."""
    num_heads, hidden_size = fields.integer("num_attention_heads"), fields.integer("hidden_size")
    if fields.get("head_dim") is not None:
        head_dim = fields.integer("head_dim")
        check_size(fields.source, "head_dim", head_dim)
        return num_heads, head_dim
    if num_heads >= 1 and family.head_dim_default is not None:
        return num_heads, family.head_dim_default
    if num_heads < 1 or hidden_size % num_heads:
        raise ConfigError(
            f"{fields.source}: hidden_size {hidden_size} does not divide into {num_heads} heads"
        )
    return num_heads, hidden_size // num_heads


def _attention_scale(fields: JsonFields, family: Family, head_dim: int) -> float:
    scalar = float(head_dim)
    if family in (GEMMA2, GEMMA3):
        scalar = fields.number("query_pre_attn_scalar", 256.0)
    if scalar <= 0:
        raise ConfigError(f"{fields.source}: query_pre_attn_scalar is {scalar}, must be above 0")
    return float(scalar**-0.5)


def _soft_cap(fields: JsonFields, family: Family, key: str, default: float) -> float | None:
    """Gemma 2 has a default, null is none. transformers' Gemma 3 caps logits but never attention scores."""
    if family is GEMMA2 and not fields.has(key):
        return default
    if fields.get(key) is None or family not in (GEMMA2, GEMMA3):
        return None
    if family is GEMMA3 and key.startswith("attn"):
        raise unsupported(fields.source, f"{key} {fields.get(key)} of a {family.architecture}")
    return fields.number(key)


def _eos_token_ids(folder: Path, fields: JsonFields) -> tuple[Path, tuple[int, ...]]:
    """The file that names them, and the ids."""
    generation = folder / "generation_config.json"
    if generation.is_file():
        ids = JsonFields.read(generation).token_ids("eos_token_id")
        if ids:
            return generation, ids
    return fields.source, fields.token_ids("eos_token_id")
