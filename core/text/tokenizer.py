"""The tokenizer of one model: text and chats to ids, ids to text."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import tokenizers

from pdserve.core.errors import ConfigError, InvalidRequest
from pdserve.core.gguf_header import GgufHeader
from pdserve.core.text.chat_template import ChatMessage, ChatTemplate
from pdserve.core.text.detokenizer import IncrementalDetokenizer
from pdserve.core.text.gguf_tokenizer import build_tokenizer, load_with_transformers, read_vocabulary
from pdserve.core.text.hf_folder import HfFolder


class Tokenizer:
    """Immutable after load; safe to share between threads."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        chat_template: str | None,
        special_tokens: Mapping[str, str],
        eos_ids: frozenset[int],
    ) -> None:
        """`special_tokens` are the names that chat templates use, with their texts.

        Raises ConfigError when the chat template does not compile.
        """
        self._backend = backend
        self._template = None if chat_template is None else ChatTemplate(chat_template, special_tokens)
        self._eos_ids = eos_ids
        self._vocab_size = 1 + max(backend.get_vocab(with_added_tokens=True).values(), default=-1)
        added = backend.get_added_tokens_decoder()
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._digest = _digest(backend, chat_template, special_tokens, eos_ids)

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """The tokenizer of a Hugging Face folder or of a .gguf file.

        Raises ConfigError when the path is missing, is neither, or holds no tokenizer.
        """
        if path.is_dir():
            folder = HfFolder(path)
            backend = folder.tokenizer()
            return cls(
                backend,
                chat_template=folder.chat_template(),
                special_tokens=folder.special_tokens(),
                eos_ids=folder.eos_ids(backend),
            )
        if not path.is_file() or path.suffix != ".gguf":
            reason = "is not a .gguf file" if path.is_file() else "does not exist"
            raise ConfigError(f"no tokenizer at {path}: it {reason}; give a model folder or a .gguf file")
        metadata = GgufHeader.read(path)
        vocabulary = read_vocabulary(metadata)
        return cls(
            build_tokenizer(metadata) or load_with_transformers(path),
            chat_template=vocabulary.chat_template,
            special_tokens=vocabulary.special_tokens,
            eos_ids=vocabulary.eos_ids,
        )

    @property
    def vocab_size(self) -> int:
        """One more than the highest id."""
        return self._vocab_size

    @property
    def eos_ids(self) -> frozenset[int]:
        """Ids after which a sequence has ended."""
        return self._eos_ids

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """Ids of `text`; special tokens in it are parsed. `add_special` adds the model's own around it.

        Raises InvalidRequest when the text is not valid Unicode.
        """
        try:
            return self._backend.encode(text, add_special_tokens=add_special).ids
        except (UnicodeEncodeError, TypeError) as error:
            raise InvalidRequest(f"the text is not valid Unicode (a lone surrogate?): {error}") from error

    def encode_chat(self, messages: Sequence[ChatMessage], tools_json: str = "") -> list[int]:
        """Ids of a conversation in the model's own chat format, up to where the assistant speaks.

        Raises InvalidRequest when the model has no chat template or its template refuses the messages.
        """
        return self.encode(self.render_chat(messages, tools_json), add_special=False)

    def render_chat(self, messages: Sequence[ChatMessage], tools_json: str = "") -> str:
        """The text that `encode_chat` encodes; same errors."""
        if self._template is None:
            raise InvalidRequest("this model has no chat template; send a plain prompt instead of messages")
        return self._template.render(messages, tools_json)

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of `ids`. Raises InvalidRequest when an id is outside the vocabulary."""
        checked = list(ids)
        for token_id in checked:
            if not 0 <= token_id < self._vocab_size:
                raise InvalidRequest(
                    f"token id {token_id} is outside the vocabulary: ids go from 0 to {self._vocab_size - 1}"
                )
        return self._backend.decode(checked, skip_special_tokens=skip_special)

    def detokenizer(self) -> IncrementalDetokenizer:
        """A fresh incremental decoder for one sequence."""
        return IncrementalDetokenizer(self._backend, self._vocab_size, self._special_ids)

    def to_json(self) -> str:
        """As the `tokenizers` library saves it."""
        return self._backend.to_str()

    def digest(self) -> str:
        """32 hex digits that name everything that decides ids and text; equal in every process."""
        return self._digest


def _digest(
    backend: tokenizers.Tokenizer,
    chat_template: str | None,
    special_tokens: Mapping[str, str],
    eos_ids: frozenset[int],
) -> str:
    rest = repr((chat_template, sorted(special_tokens.items()), sorted(eos_ids)))
    hashed = hashlib.blake2b(backend.to_str().encode(), digest_size=16)
    hashed.update(rest.encode())
    return hashed.hexdigest()
