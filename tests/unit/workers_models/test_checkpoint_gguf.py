"""Reading GGUF files as llama.cpp's converter writes them."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from decoder_oracle import all_logits, family, llama, oracle_logits, poisoned_kv, prompt, qwen2
from gguf import GGMLQuantizationType as Kind
from gguf_files import SCALE_OFFSETS, SUPER_BLOCK, stored_as, write_gguf
from tiny_families import PLAIN_ROPE, WINDOW

from pdserve.core.errors import ConfigError
from pdserve.workers.models import gguf_loader
from pdserve.workers.models.config import LayerKind, ModelConfig
from pdserve.workers.models.decoder import Decoder
from pdserve.workers.models.families import LLAMA
from pdserve.workers.models.load_config import load_config
from pdserve.workers.models.rope import inverse_frequencies
from pdserve.workers.models.rope_scaling import Rope

ROUNDED = [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1]
KINDS = [*ROUNDED, *SCALE_OFFSETS]
# Rows of whole super-blocks, which K types need.
WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4, "head_dim": 64}
GGUF_FAMILIES: dict[str, dict[str, str | int | float]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "smollm3": {},
    "gemma": {},
    "gemma2": {
        "gemma2.attention.sliding_window": WINDOW,
        "gemma2.attn_logit_softcapping": 2.0,
        "gemma2.final_logit_softcapping": 5.0,
    },
    "gemma3": {
        "gemma3.attention.sliding_window": WINDOW,
        "gemma3.rope.scaling.type": "linear",
        "gemma3.rope.scaling.factor": 8.0,
    },
}
"""Architecture to the metadata that its tiny model needs beside the usual."""


def as_llama_cpp_knows(arch: str) -> dict[str, Any]:
    """What the format leaves to the architecture's name: no-rope layers, patterns, the scale of scores."""
    if arch == "smollm3":
        return {"no_rope_layer_interval": 4, "tie_word_embeddings": False}
    if arch == "gemma3":
        kinds = ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"]
        return {"num_hidden_layers": 7, "layer_types": kinds, "query_pre_attn_scalar": 32}
    return {"query_pre_attn_scalar": 32} if arch == "gemma2" else {}


def plain_llama(**changes: Any) -> Any:
    return llama(**{"rope_parameters": PLAIN_ROPE, **changes})


def assert_same_logits(path: Path, model: Any) -> None:
    decoder = Decoder.load(path)
    ids = prompt(50)
    actual = all_logits(decoder, poisoned_kv(decoder, 4), ids, [3, 1, 0, 2], [30, 19, 1])
    torch.testing.assert_close(actual, oracle_logits(model, ids), atol=1e-4, rtol=1e-4)
    assert torch.equal(actual.argmax(-1), oracle_logits(model, ids).argmax(-1))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_type_gives_the_logits_of_the_dequantised_model(tmp_path: Path, kind: Kind) -> None:
    model = plain_llama(num_hidden_layers=2, **WIDE)
    exact = oracle_logits(model, prompt(50))
    path = write_gguf(tmp_path / "m.gguf", model, kind)
    # The oracle must have been rounded, or the comparison would not see a wrong dequantisation.
    assert torch.equal(exact, oracle_logits(model, prompt(50))) == (kind is Kind.F32)
    assert_same_logits(path, model)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_type_dequantises_as_the_gguf_package_does_in_slabs_or_whole(
    kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = np.random.default_rng(5).normal(0, 0.1, (33, 2 * SUPER_BLOCK)).astype(np.float32)
    raw, exact = stored_as(values, kind)
    raw = raw.view(np.uint8)
    assert np.array_equal(gguf_loader.dequantized(raw, kind, values.shape), exact)
    monkeypatch.setattr(gguf_loader, "_SLAB_BYTES", 4 * raw.shape[1])  # 8 slabs of 4 rows, one of 1
    assert np.array_equal(gguf_loader.dequantized(raw, kind, values.shape), exact)


@pytest.mark.parametrize("arch", GGUF_FAMILIES)
def test_every_family_gives_the_logits_of_transformers(tmp_path: Path, arch: str) -> None:
    model = family(arch, **as_llama_cpp_knows(arch))
    path = write_gguf(tmp_path / "m.gguf", model, arch=arch, metadata=GGUF_FAMILIES[arch])
    assert_same_logits(path, model)


def test_a_small_window_of_an_architecture_without_a_pattern_is_refused_with_both_numbers(
    tmp_path: Path,
) -> None:
    metadata: dict[str, str | int | float] = {"llama.attention.sliding_window": 128}
    path = write_gguf(tmp_path / "m.gguf", plain_llama(), metadata=metadata)
    with pytest.raises(ConfigError, match=r"window of 128 tokens, smaller than the context of 512"):
        load_config(path)


def test_an_end_id_without_a_row_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", plain_llama(), metadata={"tokenizer.ggml.eot_token_id": 160})
    with pytest.raises(ConfigError, match=r"m\.gguf: eos_token_id 160 is outside the model's 160 token ids"):
        load_config(path)


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
        family=LLAMA,
        vocab_size=160,
        hidden_size=96,
        intermediate_size=160,
        num_heads=6,
        num_kv_heads=2,
        head_dim=16,
        layers=(LayerKind(Rope(50000.0), None),) * 3,
        rms_norm_eps=float(np.float32(1e-6)),
        max_position_embeddings=512,
        tie_word_embeddings=False,
        attention_bias=False,
        output_bias=False,
        mlp_bias=False,
        attention_scale=0.25,
        attention_soft_cap=None,
        final_soft_cap=None,
        bos_token_id=1,
        eos_token_ids=(2, 9),
    )


def test_rope_factors_divide_the_frequencies(tmp_path: Path) -> None:
    config = load_config(write_gguf(tmp_path / "m.gguf", plain_llama()))
    factors = torch.tensor([1.0, 1.0, 1.0, 1.0, 2.0, 4.0, 8.0, 8.0])
    rope = config.layers[0].rope
    assert rope is not None
    expected = inverse_frequencies(rope, 16) / factors
    assert torch.equal(inverse_frequencies(rope, 16, factors), expected)


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
    tmp_path: Path, metadata: dict[str, str | int | float], found: str
) -> None:
    path = write_gguf(tmp_path / "m.gguf", plain_llama(), metadata=metadata)
    with pytest.raises(ConfigError, match=f"{found}.*supported are LlamaForCausalLM"):
        Decoder.load(path)


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", plain_llama(), arch="mamba")
    with pytest.raises(ConfigError, match="GGUF architecture 'mamba'"):
        Decoder.load(path)


def test_another_quantisation_is_refused_by_name(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", plain_llama(), Kind.MXFP4)
    with pytest.raises(ConfigError, match=r"type MXFP4 of .*\.weight"):
        Decoder.load(path)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", plain_llama(), skip="blk.2.ffn_up.weight")
    with pytest.raises(ConfigError, match=r"missing model\.layers\.2\.mlp\.up_proj\.weight"):
        Decoder.load(path)


def test_an_unexpected_tensor_is_named(tmp_path: Path) -> None:
    extra = {"blk.0.attn_q_norm.weight": np.ones(16, dtype=np.float32)}
    path = write_gguf(tmp_path / "m.gguf", plain_llama(), extra=extra)
    with pytest.raises(ConfigError, match=r"unexpected tensor model\.layers\.0\.self_attn\.q_norm\.weight"):
        Decoder.load(path)


@pytest.mark.parametrize("keep", [0.0, 0.0001, 0.001, 0.5, 0.999])
def test_a_truncated_file_is_named(tmp_path: Path, keep: float) -> None:
    path = write_gguf(tmp_path / "m.gguf", plain_llama())
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data))])
    with pytest.raises(ConfigError, match=r"m\.gguf, truncated or not GGUF"):
        Decoder.load(path)


HUGE = (1 << 62).to_bytes(8, "little")


@pytest.mark.parametrize(
    ("behind", "skipped", "patch", "message"),
    [
        (b"llama.block_count", 4, (4_000_000_000).to_bytes(4, "little"), "num_layers is 4000000000"),
        (b"llama.attention.key_length", 4, bytes(4), "head_dim is 0"),
        (b"token_embd.weight", 0, bytes(4), "0 dimensions"),
        (b"token_embd.weight", 4, HUGE + HUGE, "vocab_size is 4611686018427387904"),
        (b"token_embd.weight", 24, (3 << 62).to_bytes(8, "little"), "ends at byte"),
        (b"blk.1.attn_norm.weight", 16, bytes(8), "is damaged: .* begins at"),
    ],
    ids=["layers", "head size", "dimensions", "vocabulary", "past the end", "overlap"],
)
def test_a_damaged_header_is_a_clear_error_and_no_allocation(
    tmp_path: Path, behind: bytes, skipped: int, patch: bytes, message: str
) -> None:
    path = write_gguf(tmp_path / "m.gguf", plain_llama())
    data = path.read_bytes()
    at = data.index(behind) + len(behind) + skipped
    path.write_bytes(data[:at] + patch + data[at + len(patch) :])
    with pytest.raises(ConfigError, match=message):
        Decoder.load(path)


def test_arrays_nested_without_end_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    key = struct.pack("<Q", 1) + b"k"
    nest = struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 5000
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key + nest)
    with pytest.raises(ConfigError, match=r"m\.gguf, truncated or not GGUF"):
        load_config(path)
