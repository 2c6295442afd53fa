"""What each layer's attention sees, from config.json: rope and window."""

import math

from pdserve.core.errors import ConfigError
from pdserve.workers.models.config import LayerKind, own_window, unsupported
from pdserve.workers.models.families import GEMMA2, GEMMA3, MISTRAL, QWEN2, QWEN3, SMOLLM3, Family
from pdserve.workers.models.json_fields import JsonFields
from pdserve.workers.models.rope_scaling import LinearScaling, Llama3Scaling, Rope, YarnScaling

_FULL = "full_attention"
_SLIDING = "sliding_attention"
_LOCAL_THETA = 10000.0
"""Gemma 3's windowed layers, where config.json does not say."""


def layers_of(fields: JsonFields, family: Family, layers: int, context: int) -> tuple[LayerKind, ...]:
    """One kind per layer.

    Raises:
        ConfigError: a rope or layer type that this decoder does not compute, or a list of another length.
    """
    rotated = _rotated(fields, family, layers)
    window = own_window(_window(fields, family), context)
    sliding = _sliding(fields, family, rotated)
    ropes = _ropes(fields, family, context)
    return tuple(
        LayerKind(rope=ropes[slides] if turns else None, window=window if slides else None)
        for turns, slides in zip(rotated, sliding, strict=True)
    )


def _window(fields: JsonFields, family: Family) -> int | None:
    if family in (QWEN2, QWEN3, SMOLLM3) and not fields.boolean("use_sliding_window", False):
        return None
    if family not in (MISTRAL, QWEN2, QWEN3, SMOLLM3, GEMMA2, GEMMA3):
        return None
    if fields.get("sliding_window") is None and (fields.has("sliding_window") or family is SMOLLM3):
        return None
    window = fields.integer("sliding_window", 4096)
    if window < 1:
        raise ConfigError(f"{fields.source}: sliding_window is {window}, must be at least 1 or null")
    return window


def _rotated(fields: JsonFields, family: Family, layers: int) -> list[bool]:
    """Per layer whether queries and keys are rotated."""
    if family is not SMOLLM3:
        return [True] * layers
    named = fields.per_layer("no_rope_layers", layers)  # in spite of its name, 1 means rope
    if named is not None:
        return [bool(flag) for flag in named]
    interval = fields.integer("no_rope_layer_interval", 4)
    if interval < 1:
        raise ConfigError(f"{fields.source}: no_rope_layer_interval is {interval}, must be at least 1")
    return [(number + 1) % interval != 0 for number in range(layers)]


def _sliding(fields: JsonFields, family: Family, rotated: list[bool]) -> list[bool]:
    """Per layer whether the window, if there is one, applies."""
    layers = len(rotated)
    if family is MISTRAL:
        return [True] * layers
    kinds = fields.per_layer("layer_types", layers)
    if kinds is not None:
        unknown = [kind for kind in kinds if kind not in (_FULL, _SLIDING)]
        if unknown:
            raise unsupported(fields.source, f"layer type {unknown[0]!r}")
        return [kind == _SLIDING for kind in kinds]
    if family is GEMMA2:
        return [number % 2 == 0 for number in range(layers)]
    if family is GEMMA3:
        pattern = fields.integer("sliding_window_pattern", 6)
        if pattern < 1:
            raise ConfigError(f"{fields.source}: sliding_window_pattern is {pattern}, must be at least 1")
        return [(number + 1) % pattern != 0 for number in range(layers)]
    if family in (QWEN2, QWEN3):
        first = fields.integer("max_window_layers", 28)
        return [number >= first for number in range(layers)]
    return [family is SMOLLM3 and not turns for turns in rotated]


def _ropes(fields: JsonFields, family: Family, context: int) -> tuple[Rope, Rope]:
    """Of full and of windowed layers. From transformers 5 (`rope_parameters`) or 4 (the other keys)."""
    theta = fields.number("rope_theta", family.rope_theta_default)
    rope = fields.section("rope_parameters" if fields.get("rope_parameters") is not None else "rope_scaling")
    if family is not GEMMA3:
        one = _rope(fields, rope, theta, context)
        return one, one
    local = fields.number("rope_local_base_freq", _LOCAL_THETA)
    if fields.get("rope_parameters") is None:
        return _rope(fields, rope, theta, context), Rope(local)
    full, sliding = rope.section(_FULL), rope.section(_SLIDING)
    return _rope(fields, full, theta, context), _rope(fields, sliding, local, context)


def _rope(fields: JsonFields, rope: JsonFields, theta: float, context: int) -> Rope:
    theta = rope.number("rope_theta", theta)
    for owner in (fields, rope):
        if owner.number("partial_rotary_factor", 1.0) != 1.0:
            raise unsupported(fields.source, f"partial_rotary_factor {owner.get('partial_rotary_factor')}")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    original = rope.integer("original_max_position_embeddings", context)
    if original < 1:
        raise ConfigError(f"{fields.source}: the trained context is {original} tokens, must be at least 1")
    match kind:
        # Dynamic scaling begins beyond the context, where no request is admitted.
        case "default" | "dynamic":
            return Rope(theta)
        case "linear":
            return Rope(theta, LinearScaling(rope.number("factor")))
        case "llama3":
            return Rope(
                theta,
                Llama3Scaling(
                    factor=rope.number("factor"),
                    low_freq_factor=rope.number("low_freq_factor"),
                    high_freq_factor=rope.number("high_freq_factor"),
                    original_context=original,
                ),
            )
        case "yarn":
            return Rope(theta, _yarn(rope, original, context))
    raise unsupported(fields.source, f"rope type {kind!r}")


def _yarn(rope: JsonFields, original: int, context: int) -> YarnScaling:
    factor = rope.number("factor", context / original)
    scale, scale_all = rope.number("mscale", 0.0), rope.number("mscale_all_dim", 0.0)
    if rope.get("attention_factor") is not None:
        attention = rope.number("attention_factor")
    elif scale and scale_all:
        attention = _yarn_attention(factor, scale) / _yarn_attention(factor, scale_all)
    else:
        attention = _yarn_attention(factor, 1.0)
    return YarnScaling(
        factor=factor,
        original_context=original,
        attention_factor=attention,
        beta_fast=rope.number("beta_fast", 32.0) or 32.0,
        beta_slow=rope.number("beta_slow", 1.0) or 1.0,
        truncate=rope.boolean("truncate", True),
    )


def _yarn_attention(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0
