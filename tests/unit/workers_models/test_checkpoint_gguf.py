"""Reading GGUF files as llama.cpp's converter writes them."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from decoder_oracle import PLAIN_ROPE, all_logits, llama, oracle_logits, poisoned_kv, prompt, qwen2
from gguf import GGMLQuantizationType as Kind

from pdserve.core.errors import ConfigError
from pdserve.workers.models.checkpoint import load_config
from pdserve.workers.models.config import ModelConfig
from pdserve.workers.models.decoder import Decoder
from pdserve.workers.models.rope import inverse_frequencies

KINDS = [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1]
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def interleaved(weights: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's converter, for q and k of the llama architecture."""
    return (
        weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
        .swapaxes(1, 2)
        .reshape(weights.shape)
    )


def write_gguf(
    path: Path,
    model: Any,
    kind: Kind = Kind.F32,
    arch: str = "llama",
    skip: str = "",
    extra: dict[str, np.ndarray] | None = None,
    metadata: dict[str, str | int] | None = None,
) -> Path:
    """Write `model` with its matrices in `kind`, and round the model itself to what was written."""
    config = model.config
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for key, value in (metadata or {}).items():
        writer.add_string(key, value) if isinstance(value, str) else writer.add_uint32(key, value)
    for name, tensor in model.state_dict().items():
        values = tensor.numpy()
        stored = Kind.F32 if values.ndim == 1 else kind
        tensor.copy_(torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(values, stored), stored)))
        if arch == "llama" and "q_proj" in name:
            values = interleaved(values, config.num_attention_heads)
        if arch == "llama" and "k_proj" in name:
            values = interleaved(values, config.num_key_value_heads)
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        if name != skip:
            writer.add_tensor(name, gguf.quants.quantize(values, stored), raw_dtype=stored)
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def plain_llama(**changes: Any) -> Any:
    return llama(**{"rope_parameters": PLAIN_ROPE, **changes})


def assert_same_logits(path: Path, model: Any) -> None:
    decoder = Decoder.load(path)
    ids = prompt(50)
    actual = all_logits(decoder, poisoned_kv(decoder, 4), ids, [3, 1, 0, 2], [30, 19, 1])
    torch.testing.assert_close(actual, oracle_logits(model, ids), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_type_gives_the_logits_of_the_dequantised_model(tmp_path: Path, kind: Kind) -> None:
    model = plain_llama()
    exact = oracle_logits(model, prompt(50))
    path = write_gguf(tmp_path / "m.gguf", model, kind)
    # The oracle must have been rounded, or the comparison would not see a wrong dequantisation.
    assert torch.equal(exact, oracle_logits(model, prompt(50))) == (kind is Kind.F32)
    assert_same_logits(path, model)


def test_qwen2_rows_are_not_permuted_and_biases_are_read(tmp_path: Path) -> None:
    model = qwen2()
    assert_same_logits(write_gguf(tmp_path / "m.gguf", model, arch="qwen2"), model)


def test_llama_biases_are_permuted_with_their_rows(tmp_path: Path) -> None:
    model = plain_llama(attention_bias=True, mlp_bias=True)
    assert_same_logits(write_gguf(tmp_path / "m.gguf", model), model)


def test_llama3_rope_factors_are_honoured(tmp_path: Path) -> None:
    model = llama()
    scaled = model.model.rotary_emb.inv_freq
    plain = 1.0 / 10000.0 ** (torch.arange(0, 16, 2) / 16)
    factors = (plain / scaled).numpy()
    assert factors.max() > 2
    assert_same_logits(write_gguf(tmp_path / "m.gguf", model, extra={"rope_freqs.weight": factors}), model)


def test_a_tied_model_has_no_output_matrix(tmp_path: Path) -> None:
    model = plain_llama(tie_word_embeddings=True)
    path = write_gguf(tmp_path / "m.gguf", model, skip="output.weight")
    assert load_config(path).tie_word_embeddings
    assert_same_logits(path, model)


def test_metadata_becomes_the_configuration(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", plain_llama(), metadata={"tokenizer.ggml.eot_token_id": 9})
    assert load_config(path) == ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=160,
        hidden_size=96,
        intermediate_size=160,
        num_layers=3,
        num_heads=6,
        num_kv_heads=2,
        head_dim=16,
        rms_norm_eps=float(np.float32(1e-6)),
        rope_theta=50000.0,
        rope_scaling=None,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        attention_bias=False,
        output_bias=False,
        mlp_bias=False,
        bos_token_id=1,
        eos_token_ids=(2, 9),
    )


def test_rope_factors_divide_the_frequencies(tmp_path: Path) -> None:
    config = load_config(write_gguf(tmp_path / "m.gguf", plain_llama()))
    factors = torch.tensor([1.0, 1.0, 1.0, 1.0, 2.0, 4.0, 8.0, 8.0])
    expected = inverse_frequencies(config) / factors
    assert torch.equal(inverse_frequencies(config, factors), expected)


@pytest.mark.parametrize(
    ("metadata", "found"),
    [
        ({"llama.rope.scaling.type": "yarn"}, "'yarn'"),
        ({"llama.expert_count": 8}, "mixture of experts"),
        ({"llama.rope.dimension_count": 8}, "rope.dimension_count"),
        ({"split.count": 3}, "split GGUF"),
    ],
)
def test_what_the_decoder_would_compute_wrongly_is_refused(
    tmp_path: Path, metadata: dict[str, str | int], found: str
) -> None:
    path = write_gguf(tmp_path / "m.gguf", plain_llama(), metadata=metadata)
    with pytest.raises(ConfigError, match=f"{found}.*supported are LlamaForCausalLM"):
        Decoder.load(path)


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", plain_llama(), arch="gemma")
    with pytest.raises(ConfigError, match="GGUF architecture 'gemma'"):
        Decoder.load(path)


def test_another_quantisation_is_refused_by_name(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", plain_llama(), Kind.Q5_0)
    with pytest.raises(ConfigError, match=r"type Q5_0 of .*\.weight"):
        Decoder.load(path)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", plain_llama(), skip="blk.2.ffn_up.weight")
    with pytest.raises(ConfigError, match=r"missing model\.layers\.2\.mlp\.up_proj\.weight"):
        Decoder.load(path)


def test_an_unexpected_tensor_is_named(tmp_path: Path) -> None:
    extra = {"blk.0.attn_q_norm.weight": np.ones(16, dtype=np.float32)}
    path = write_gguf(tmp_path / "m.gguf", plain_llama(), extra=extra)
    with pytest.raises(ConfigError, match=r"unexpected tensor blk\.0\.attn_q_norm\.weight"):
        Decoder.load(path)


@pytest.mark.parametrize("keep", [0.0, 0.0001, 0.001, 0.5, 0.999])
def test_a_truncated_file_is_named(tmp_path: Path, keep: float) -> None:
    path = write_gguf(tmp_path / "m.gguf", plain_llama())
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data))])
    with pytest.raises(ConfigError, match=r"m\.gguf, truncated or not GGUF"):
        Decoder.load(path)
