"""config.json in the forms that transformers 4 and 5 write, and refusal of other models."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from decoder_oracle import LLAMA3_ROPE, llama, qwen2, saved

from pdserve.core.errors import ConfigError
from pdserve.workers.models.config import LayerKind, ModelConfig
from pdserve.workers.models.hf_config import config_from_folder
from pdserve.workers.models.rope_scaling import Llama3Scaling, Rope

BASE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "hidden_act": "silu",
}
SCALING = Llama3Scaling(8.0, 1.0, 4.0, 64)
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


def only_rope(config: ModelConfig) -> Rope:
    (rope,) = {layer.rope for layer in config.layers}
    assert rope is not None
    return rope


def written(folder: Path, generation: dict[str, Any] | None = None, **changes: Any) -> Path:
    (folder / "config.json").write_text(json.dumps({**BASE, **changes}))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def test_absent_fields_take_transformers_defaults(tmp_path: Path) -> None:
    config = config_from_folder(written(tmp_path))
    assert (config.num_kv_heads, config.head_dim) == (4, 16)
    assert config.rms_norm_eps == 1e-6
    assert config.layers == (LayerKind(Rope(10000.0), None),) * 2
    assert (config.tie_word_embeddings, config.attention_bias, config.mlp_bias) == (False, False, False)
    assert (config.bos_token_id, config.eos_token_ids) == (None, ())


def test_both_rope_forms_read_the_same(tmp_path: Path) -> None:
    (tmp_path / "v4").mkdir()
    (tmp_path / "v5").mkdir()
    scaling = {key: value for key, value in LLAMA3_ROPE.items() if key != "rope_theta"}
    v4 = config_from_folder(written(tmp_path / "v4", rope_theta=10000.0, rope_scaling=scaling))
    v5 = config_from_folder(written(tmp_path / "v5", rope_parameters=LLAMA3_ROPE))
    assert v4 == v5
    assert only_rope(v4).scaling == SCALING


def test_the_old_key_type_names_the_rope_too(tmp_path: Path) -> None:
    old = {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = config_from_folder(written(tmp_path, rope_theta=5e5, rope_scaling=old))
    assert only_rope(config) == Rope(5e5, replace(SCALING, original_context=128))


@pytest.mark.parametrize(("tied", "bias"), [(True, False), (False, True)])
def test_what_transformers_saves_is_read_back(tmp_path: Path, tied: bool, bias: bool) -> None:
    model = llama(tie_word_embeddings=tied, attention_bias=bias, mlp_bias=bias)
    config = config_from_folder(saved(model, tmp_path))
    assert config.tie_word_embeddings is tied
    assert (config.attention_bias, config.output_bias, config.mlp_bias) == (bias, bias, bias)
    assert only_rope(config).scaling == SCALING


def test_qwen2_has_qkv_biases_only(tmp_path: Path) -> None:
    config = config_from_folder(saved(qwen2(), tmp_path))
    assert (config.attention_bias, config.output_bias, config.mlp_bias) == (True, False, False)


@pytest.mark.parametrize(
    ("generation", "expected"),
    [(None, (7,)), ({}, (7,)), ({"eos_token_id": 8}, (8,)), ({"eos_token_id": [8, 9]}, (8, 9))],
)
def test_generation_config_decides_where_sequences_end(
    tmp_path: Path, generation: dict[str, Any] | None, expected: tuple[int, ...]
) -> None:
    config = config_from_folder(written(tmp_path, generation, eos_token_id=7, bos_token_id=1))
    assert (config.bos_token_id, config.eos_token_ids) == (1, expected)


def test_mistral_without_a_window_is_a_llama(tmp_path: Path) -> None:
    config = config_from_folder(written(tmp_path, architectures=["MistralForCausalLM"], sliding_window=None))
    assert not config.attention_bias


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, "MixtralForCausalLM"),
        ({"architectures": None}, "architectures None"),
        ({"architectures": ["Gemma3ForConditionalGeneration"]}, "Gemma3ForConditionalGeneration"),
        ({"architectures": ["GemmaForCausalLM"], "hidden_act": "relu"}, "hidden_act 'relu'"),
        (
            {"architectures": ["Gemma2ForCausalLM"], "hidden_activation": "silu"},
            "hidden_activation 'silu'",
        ),
        (
            {
                "architectures": ["Gemma3ForCausalLM"],
                "attn_logit_softcapping": 50.0,
            },
            "attn_logit_softcapping 50.0",
        ),
        (
            {"architectures": ["Gemma3ForCausalLM"], "use_bidirectional_attention": True},
            "use_bidirectional_attention",
        ),
        (
            {"architectures": ["Qwen3ForCausalLM"], "layer_types": ["chunked_attention"] * 2},
            "layer type 'chunked_attention'",
        ),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 4.0}}, "rope type 'longrope'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    ],
)
def test_what_the_decoder_would_compute_wrongly_is_refused(
    tmp_path: Path, changes: dict[str, Any], found: str
) -> None:
    with pytest.raises(ConfigError, match=f"{found}.*supported are LlamaForCausalLM"):
        config_from_folder(written(tmp_path, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"eos_token_id": 100}, "eos_token_id 100 is outside the model's 100 token ids"),
        ({"eos_token_id": [3, -1]}, "eos_token_id -1 is outside"),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 0}, "sliding_window is 0"),
        ({"architectures": ["SmolLM3ForCausalLM"], "no_rope_layers": [1]}, "1 entries, must be a list of 2"),
        ({"architectures": ["SmolLM3ForCausalLM"], "no_rope_layer_interval": 0}, "interval is 0"),
        (
            {
                "architectures": ["Gemma2ForCausalLM"],
                "hidden_activation": None,
                "query_pre_attn_scalar": 0,
            },
            "query_pre_attn_scalar is 0",
        ),
        ({"vocab_size": "100"}, "vocab_size is '100', must be an integer"),
        ({"vocab_size": True}, "must be an integer"),
        ({"num_hidden_layers": 0}, "num_layers is 0"),
        ({"num_key_value_heads": 3}, "do not divide into 3 key-value heads"),
        ({"num_attention_heads": 5}, "does not divide into 5 heads"),
        ({"num_attention_heads": 0}, "0 heads"),
        ({"head_dim": 15}, "odd"),
        ({"rms_norm_eps": "small"}, "must be a number"),
        ({"tie_word_embeddings": "no"}, "must be true or false"),
        ({"eos_token_id": "</s>"}, "must be a token id"),
        ({"rope_scaling": [1]}, "must be an object"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor is missing"),
        ({"num_hidden_layers": 10**10}, "num_layers is 10000000000, must be at most"),
        ({"vocab_size": 10**30}, "vocab_size is 10+, must be at most"),
        ({"max_position_embeddings": 10**30}, "max_position_embeddings is 10+, must be at most"),
        ({"head_dim": -2}, "head_dim is -2, must be at least 1"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0"),
        ({"rope_theta": 10**400}, "rope_theta is inf, must be finite"),
        ({"rope_theta": float("nan")}, "rope_theta is nan, must be finite"),
        ({"rope_theta": 0}, "theta 0, must be above 1"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "factor 0, must be above 0"),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": 0}}, "low_freq_factor 0, must be above 0"),
        ({"rope_scaling": {**LLAMA3, "high_freq_factor": 1}}, "high_freq_factor 1, must be above 1"),
        ({"rope_scaling": {**YARN, "original_max_position_embeddings": 0}}, "trained context is 0 tokens"),
        ({"rope_scaling": {**YARN, "factor": -1}}, "factor -1, must be above 0"),
        ({"architectures": [{}]}, "architectures"),
        ({"hidden_act": ["silu"]}, "hidden_act"),
    ],
)
def test_wrong_numbers_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_from_folder(written(tmp_path, **changes))


@pytest.mark.parametrize("content", [None, "{", "[1]"])
def test_an_unreadable_config_is_named(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"config\.json"):
        config_from_folder(tmp_path)
