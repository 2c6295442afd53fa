"""`pdserve models` says what files hold and need; whatever a worker could not load is refused by it, too."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_families import FAMILIES
from tiny_model import END_ID, add_byte_tokenizer

from pdserve.cli.app import run
from pdserve.core.catalog import DEMO_MODEL
from pdserve.core.errors import ConfigError
from pdserve.core.text.tokenizer import Tokenizer
from pdserve.workers.model_host import ModelHost
from pdserve.workers.models.decoder import Decoder
from pdserve.workers.models.report import describe
from pdserve.workers.spec import WorkerSpec


def model_folder(folder: Path, **options: Any) -> Path:
    model = FAMILIES["qwen3"].build(vocab_size=END_ID + 1, bos_token_id=None, eos_token_id=END_ID)
    model.to(torch.bfloat16).save_pretrained(folder, **options)
    add_byte_tokenizer(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return model_folder(tmp_path / "m")


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_a_sharded_folder_is_described(tmp_path: Path) -> None:
    folder = model_folder(tmp_path, max_shard_size="50KB")
    said = describe(str(folder), pool_blocks=100).to_dict()
    decoder = Decoder.load(folder)
    shards = {file.name: file.stat().st_size for file in folder.glob("*.safetensors")}
    assert len(shards) > 2
    assert said["files"] == shards
    assert said["file_bytes"] == sum(shards.values())
    assert (said["architecture"], said["layers"]) == ("Qwen3ForCausalLM", 2)
    assert (said["heads"], said["kv_heads"], said["head_dim"], said["context_tokens"]) == (4, 2, 32, 512)
    assert (said["vocabulary"], said["tokenizer_ids"], said["chat_template"]) == (257, 257, True)
    assert said["tokenizer_digest"] == Tokenizer.load(folder).digest()
    (stored,) = said["source_types"].items()
    weights = sum(t.nbytes for file in folder.glob("*.safetensors") for t in load_file(file).values())
    assert stored[0] == "BF16"
    assert stored[1]["bytes"] == weights
    full, half = said["memory"]["float32"], said["memory"]["bfloat16"]
    repeated = 2 * (3 + 1) * 32 * 2  # q and k norms are held once per head, in each of 2 layers
    assert full["weight_bytes"] == 2 * half["weight_bytes"] == 2 * (weights + repeated)
    assert full["kv_bytes_per_block"] == decoder.config.num_layers * 2 * 2 * 16 * 32 * 4
    assert full["pool_bytes"] == 100 * full["kv_bytes_per_block"]


def test_the_demo_model_is_described_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["models", DEMO_MODEL]) == 0
    out = capsys.readouterr().out
    assert "LlamaForCausalLM, 30 layers" in out
    assert "9 heads on 3 kv heads of 64" in out
    assert "Q4_1 (210, 66.4 MB)" in out
    assert "538 MB" in out  # 134.5 M weights in float32
    assert "737 kB" in out  # 30 layers x 2 x 3 heads x 16 tokens x 64 x 4 bytes


def test_json_has_a_row_for_each_model_and_the_status_says_that_one_failed(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["models", "--json", "--pool-blocks", "9", str(folder), str(tmp_path / "none")]) == 1
    good, bad = json.loads(capsys.readouterr().out)
    assert good["memory"]["float32"]["pool_blocks"] == 9
    assert good["memory"]["float32"]["fits"] is True
    assert "no model" in bad["error"]


def test_what_does_not_fit_is_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["models", "--pool-blocks", "1000000000", str(folder)]) == 0
    assert "does not fit" in capsys.readouterr().out


def test_without_a_name_the_demo_model_and_the_hubs_cache_are_listed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cache, scan = tmp_path / "hub", huggingface_hub.scan_cache_dir
    for name, config in (("good", (folder / "config.json").read_text()), ("strange", '{"architectures": 1}')):
        repo = cache / f"models--org--{name}"
        (repo / "snapshots" / "abc").mkdir(parents=True)
        (repo / "refs").mkdir()
        (repo / "refs" / "main").write_text("abc")
        (repo / "snapshots" / "abc" / "config.json").write_text(config)
    monkeypatch.setattr(huggingface_hub, "scan_cache_dir", lambda: scan(cache))
    assert run(["models", "--json"]) == 0
    rows = {row["model"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows.keys() == {DEMO_MODEL, "org/good", "org/strange"}
    assert rows[DEMO_MODEL]["architecture"] == "LlamaForCausalLM"
    assert rows["org/good"]["architecture"] == "Qwen3ForCausalLM"
    assert "architectures 1 is not supported" in rows["org/strange"]["error"]
    assert run(["models"]) == 0
    assert "cannot be served" in capsys.readouterr().out


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def other_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def truncated(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def missing_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.self_attn.q_norm.weight"]
    save_file(tensors, folder / "model.safetensors")


def wrong_shape(folder: Path) -> None:
    edit_json(folder / "config.json", intermediate_size=64)


def other_tokenizer(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["more"] = 257
    (folder / "tokenizer.json").write_text(json.dumps(content))


def end_out_of_range(folder: Path) -> None:
    edit_json(folder / "generation_config.json", eos_token_id=[END_ID, 257])


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def unknown_architecture(folder: Path) -> None:
    edit_json(folder / "config.json", architectures=["MambaForCausalLM"])


def not_json(folder: Path) -> None:
    (folder / "config.json").write_text('{"hidden_size": 64')


BAD: dict[Callable[[Path], None], str] = {
    no_weights: "m has no weights: neither model.safetensors nor .*; download the model's safetensors",
    other_weights: "m has no weights.* only pytorch_model.bin, which is not read: convert the model",
    truncated: "cannot read .*model.safetensors, truncated or not safetensors.*; download the file again",
    missing_tensor: "missing model.layers.1.self_attn.q_norm.weight; .*download it again",
    wrong_shape: r"mlp.* has shape \[.*112.*\], the configuration says \[.*64.*\]; .*download both again",
    other_tokenizer: "tokenizer.json does not match the model: it has 258 token ids, the embedding 257 rows",
    end_out_of_range: "generation_config.json: eos_token_id 257 is outside the model's 257 token ids",
    no_tokenizer: "no tokenizer in .*m: expected tokenizer.json",
    unknown_architecture: "config.json: .*MambaForCausalLM.* supported are LlamaForCausalLM, Mistral",
    not_json: "config.json is not JSON .*: download it again",
}


@pytest.mark.parametrize("spoil", BAD, ids=lambda spoil: spoil.__name__)
def test_a_bad_folder_is_refused_by_the_report_and_by_a_worker(
    folder: Path, spoil: Callable[[Path], None]
) -> None:
    spoil(folder)
    with pytest.raises(ConfigError, match=BAD[spoil]):
        describe(str(folder), pool_blocks=10)
    with pytest.raises(ConfigError, match=BAD[spoil]):
        ModelHost.load(WorkerSpec(worker="w", role="mixed", model=str(folder)))


def test_special_tokens_without_a_row_are_dropped(folder: Path) -> None:
    """Gemma 3 1B ships an image token that its embedding does not have."""
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    image = {**content["added_tokens"][0], "id": END_ID + 1, "content": "<image>"}
    content["added_tokens"].append(image)
    file.write_text(json.dumps(content))
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.vocab_size == END_ID + 1
    assert max(tokenizer.encode("a<image>b<end>")) == END_ID
    assert describe(str(folder), pool_blocks=1).tokenizer_ids == END_ID + 1
