"""Reading Hugging Face folders: single file, shards, and every way in which they are broken."""

import json
from pathlib import Path

import pytest
import torch
from decoder_oracle import all_logits, llama, oracle_logits, poisoned_kv, prompt, saved
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from pdserve.core.errors import ConfigError
from pdserve.workers.models.decoder import Decoder

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved(llama(), tmp_path / "single")


def rewrite(folder: Path, change: dict[str, torch.Tensor | None]) -> None:
    """Replace (or, for None, drop) tensors of model.safetensors."""
    tensors = load_file(folder / "model.safetensors")
    merged = {name: change.get(name, tensors.get(name)) for name in tensors | change}
    save_file({n: t for n, t in merged.items() if t is not None}, folder / "model.safetensors")


def test_shards_give_the_logits_of_transformers(tmp_path: Path) -> None:
    model = llama()
    folder = saved(model, tmp_path, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    decoder = Decoder.load(folder)
    ids = prompt(40)
    actual = all_logits(decoder, poisoned_kv(decoder, 3), ids, [2, 0, 1], [40])
    torch.testing.assert_close(actual, oracle_logits(model, ids), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_load_into_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    decoder = Decoder.load(saved(llama().to(dtype), tmp_path))
    model = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = prompt(20)
    actual = all_logits(decoder, poisoned_kv(decoder, 2), ids, [1, 0], [20])
    torch.testing.assert_close(actual, oracle_logits(model, ids), atol=1e-4, rtol=1e-4)


def test_a_tied_model_ignores_a_stored_head(tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=True)
    folder = saved(model, tmp_path)
    rewrite(folder, {"lm_head.weight": torch.zeros(160, 96)})
    decoder = Decoder.load(folder)
    ids = prompt(5)
    actual = all_logits(decoder, poisoned_kv(decoder, 1), ids, [0], [5])
    torch.testing.assert_close(actual, oracle_logits(model, ids), atol=1e-4, rtol=1e-4)


def test_rotary_buffers_of_old_checkpoints_are_ignored(folder: Path) -> None:
    rewrite(folder, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    Decoder.load(folder)


def test_a_missing_tensor_is_named(folder: Path) -> None:
    rewrite(folder, {UP: None})
    with pytest.raises(ConfigError, match=f"missing {UP}"):
        Decoder.load(folder)


def test_an_unexpected_tensor_is_named(folder: Path) -> None:
    rewrite(folder, {"model.layers.0.self_attn.q_norm.weight": torch.ones(16)})
    with pytest.raises(ConfigError, match=r"unexpected tensor model\.layers\.0\.self_attn\.q_norm\.weight"):
        Decoder.load(folder)


def test_a_wrong_shape_is_named_with_both_shapes(folder: Path) -> None:
    rewrite(folder, {UP: torch.zeros(95, 96)})
    with pytest.raises(ConfigError, match=rf"{UP} has shape \[95, 96\], the configuration says \[160, 96\]"):
        Decoder.load(folder)


def test_an_integer_tensor_is_refused(folder: Path) -> None:
    rewrite(folder, {UP: torch.zeros(160, 96, dtype=torch.int8)})
    with pytest.raises(ConfigError, match=rf"dtype I8 of {UP}"):
        Decoder.load(folder)


@pytest.mark.parametrize("keep", [4, 200, 0.5, 0.999])
def test_a_truncated_file_is_named(folder: Path, keep: float) -> None:
    file = folder / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(keep if keep > 1 else keep * len(data))])
    with pytest.raises(ConfigError, match=r"model\.safetensors, truncated or not safetensors"):
        Decoder.load(folder)


def test_a_folder_without_weights_says_what_it_looked_for(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        Decoder.load(folder)


def sharded(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    folder = saved(llama(), tmp_path / "shards", max_shard_size="100KB")
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    return folder, weight_map


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder, weight_map = sharded(tmp_path)
    (folder / weight_map[UP]).unlink()
    with pytest.raises(ConfigError, match=f"names {weight_map[UP]}, which is not in the folder"):
        Decoder.load(folder)


def test_a_tensor_that_its_shard_lacks_is_named(tmp_path: Path) -> None:
    folder, weight_map = sharded(tmp_path)
    file = folder / weight_map[UP]
    save_file({name: t for name, t in load_file(file).items() if name != UP}, file)
    with pytest.raises(ConfigError, match=f"lacks {UP}"):
        Decoder.load(folder)


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "{}",
        '{"weight_map": {"a": "../b.safetensors"}}',
        '{"weight_map": {"a": 5}}',
        '{"weight_map": {"a": null}}',
        "[" * 100_000,
    ],
    ids=["cut", "list", "empty", "outside", "number", "null", "deep"],
)
def test_a_broken_index_is_named(tmp_path: Path, content: str) -> None:
    folder, _ = sharded(tmp_path)
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ConfigError, match=r"model\.safetensors\.index\.json"):
        Decoder.load(folder)


def test_an_unsupported_compute_dtype_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"torch\.float16 is not supported"):
        Decoder.load(folder, dtype=torch.float16)


def test_a_path_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"neither a model folder nor a \.gguf file"):
        Decoder.load(tmp_path / "nothing")
