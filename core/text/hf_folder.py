"""The text side of a Hugging Face model folder: tokenizer.json and the small files beside it."""

import json
from pathlib import Path
from typing import Any, Final

from tokenizers import Tokenizer

from pdserve.core.errors import ConfigError

_SPECIAL_NAMES: Final = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_SLOW_TOKENIZER_FILES: Final = ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


class HfFolder:
    """Reads one folder. Every problem with its files is a ConfigError that names the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._config = self._read_json("tokenizer_config.json")

    def tokenizer(self) -> Tokenizer:
        """The fast tokenizer; transformers converts the older formats."""
        file = self.path / "tokenizer.json"
        if not file.is_file():
            return self._convert_slow()
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise ConfigError(f"{file} is not a tokenizer: {error}; download the model again") from error
        tokenizer = self._without_rowless_tokens(tokenizer, file)
        # Left over from training in some folders: a server must neither cut nor pad a prompt.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    def chat_template(self) -> str | None:
        """The template's source: chat_template.jinja first, then the entry of tokenizer_config.json."""
        file = self.path / "chat_template.jinja"
        if file.is_file():
            try:
                return file.read_text(encoding="utf-8")
            except (OSError, ValueError) as error:
                raise ConfigError(f"{file} cannot be read as a text: {error}; download it again") from error
        entry = self._config.get("chat_template")
        if isinstance(entry, list):
            named = {item.get("name"): item.get("template") for item in entry if isinstance(item, dict)}
            entry = named.get("default")
        if entry is None or isinstance(entry, str):
            return entry
        raise ConfigError(
            f"{self.path / 'tokenizer_config.json'}: chat_template is neither a text nor a list"
        )

    def special_tokens(self) -> dict[str, str]:
        """Names as templates use them (`bos_token`, …) to their texts."""
        entries = {name: self._config.get(name) for name in _SPECIAL_NAMES}
        texts = {name: e.get("content") if isinstance(e, dict) else e for name, e in entries.items()}
        return {name: text for name, text in texts.items() if isinstance(text, str)}

    def eos_ids(self, tokenizer: Tokenizer) -> frozenset[int]:
        """Ids that end a sequence: the tokenizer's, with those of generation_config.json or config.json."""
        ids: list[object] = []
        text = self.special_tokens().get("eos_token")
        own = tokenizer.token_to_id(text) if text is not None else None
        if own is not None:
            ids.append(own)
        for name in ("generation_config.json", "config.json"):
            entry = self._read_json(name).get("eos_token_id")
            if entry is not None:
                ids += entry if isinstance(entry, list) else [entry]
                break
        numbers = [number for number in ids if isinstance(number, int) and not isinstance(number, bool)]
        if len(numbers) < len(ids):
            raise ConfigError(f"{self.path}: eos_token_id must be a number or a list of numbers, got {ids}")
        return frozenset(numbers)

    def _without_rowless_tokens(self, tokenizer: Tokenizer, file: Path) -> Tokenizer:
        """Drop special tokens that the embedding has no row for.

        Some text models come with the tokenizer of their larger, multimodal kin (Gemma 3 1B's image token).
        """
        rows = self._read_json("config.json").get("vocab_size")
        if not isinstance(rows, int) or not any(
            token_id >= rows and token.special
            for token_id, token in tokenizer.get_added_tokens_decoder().items()
        ):
            return tokenizer
        content = json.loads(file.read_text(encoding="utf-8"))
        content["added_tokens"] = [
            token for token in content["added_tokens"] if token["id"] < rows or not token["special"]
        ]
        return Tokenizer.from_str(json.dumps(content))

    def _convert_slow(self) -> Tokenizer:
        if not any((self.path / name).is_file() for name in _SLOW_TOKENIZER_FILES):
            raise ConfigError(
                f"no tokenizer in {self.path}: expected tokenizer.json or one of "
                f"{', '.join(_SLOW_TOKENIZER_FILES)}; download it with the model"
            )
        from transformers import AutoTokenizer

        try:
            backend = AutoTokenizer.from_pretrained(
                str(self.path), local_files_only=True, trust_remote_code=False
            ).backend_tokenizer
        except Exception as error:
            raise ConfigError(f"the tokenizer in {self.path} cannot be converted: {error}") from error
        if not isinstance(backend, Tokenizer):
            raise ConfigError(f"the tokenizer in {self.path} has no fast form; add a tokenizer.json")
        return backend

    def _read_json(self, name: str) -> dict[str, Any]:
        file = self.path / name
        if not file.is_file():
            return {}
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"{file} is not JSON ({error}): download it again") from error
        if not isinstance(content, dict):
            raise ConfigError(f"{file} holds a {type(content).__name__}, expected an object")
        return content
