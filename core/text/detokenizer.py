"""Token ids to text, one at a time, without ever showing text that a later token would change.

`tokenizers.decoders.DecodeStream` is not used: with byte-fallback vocabularies it raises on byte runs that
are not UTF-8 ("Invalid prefix encountered"), and it has no call that yields what it still holds at the end.
"""

import codecs
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Final

import tokenizers
from tokenizers import decoders

from pdserve.core.errors import InvalidRequest

_REPLACEMENT: Final = "\N{REPLACEMENT CHARACTER}"


class IncrementalDetokenizer:
    """Text of one sequence as its tokens arrive; special tokens give no text.

    The concatenation of all `push` results and one `finish` equals the decoding of all ids at once.
    Owned by one sequence; not safe for two threads.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, vocab_size: int, special_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._special_ids = special_ids
        self._stream: _Stream = (
            _ByteLevelStream()
            if isinstance(tokenizer.decoder, decoders.ByteLevel)
            else _WindowStream(tokenizer)
        )

    def push(self, token_id: int) -> str:
        """The text that became certain with this token; may be empty.

        Raises InvalidRequest when the id is outside the vocabulary.
        """
        if not 0 <= token_id < self._vocab_size:
            raise InvalidRequest(
                f"token id {token_id} is outside the vocabulary: ids go from 0 to {self._vocab_size - 1}"
            )
        token = self._tokenizer.id_to_token(token_id)
        if token is None or token_id in self._special_ids:  # None: a hole between ids, no text
            return ""
        return self._stream.push(token_id, token)

    def finish(self) -> str:
        """What was held back; half a character becomes a replacement character. Push nothing after it."""
        return self._stream.finish()


class _Stream(ABC):
    """How one family of decoders goes on from token to token."""

    @abstractmethod
    def push(self, token_id: int, token: str) -> str: ...

    @abstractmethod
    def finish(self) -> str: ...


class _ByteLevelStream(_Stream):
    """Byte-level BPE: a token is bytes, so an incremental UTF-8 decoder is exact, at constant cost."""

    def __init__(self) -> None:
        self._bytes = _byte_of_char()
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int, token: str) -> str:
        return self._utf8.decode(_token_bytes(token, self._bytes))

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


class _WindowStream(_Stream):
    """Any other decoder, taken as a black box: decode a short window and emit what it adds to its head.

    The window is [context | new]: `context` are the tokens of the piece emitted last, so that rules about the
    first token (a stripped leading space) act on text that is already out. While the window ends in a
    byte-fallback run the decoder may still rewrite that whole run, so nothing of it is emitted.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._context_tokens = 0
        self._context_text = ""

    def push(self, token_id: int, token: str) -> str:
        self._window.append(token_id)
        if _is_byte_token(token):
            return ""
        text = self._decode(self._window)
        grew = len(text) > len(self._context_text) and text.startswith(self._context_text)
        if not grew or text.endswith(_REPLACEMENT):
            return ""
        emitted = text[len(self._context_text) :]
        self._window = self._window[self._context_tokens :]
        self._context_tokens = len(self._window)
        self._context_text = self._decode(self._window)
        return emitted

    def finish(self) -> str:
        text = self._decode(self._window)[len(self._context_text) :]
        self._window, self._context_tokens, self._context_text = [], 0, ""
        return text

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)


def _is_byte_token(token: str) -> bool:
    """`<0x00>` … `<0xFF>`, as byte-fallback vocabularies write single bytes."""
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _byte_of_char() -> Mapping[str, int]:
    """The stand-ins of byte-level BPE, char to byte (GPT-2: unprintable bytes move to U+0100 and up)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(0x100) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(moved)}


def _token_bytes(token: str, byte_of_char: Mapping[str, int]) -> bytes:
    """The bytes a byte-level decoder makes of a token; a token with any other character stands for itself."""
    try:
        return bytes([byte_of_char[char] for char in token])
    except KeyError:
        return token.encode()
