"""Log probabilities in OpenAI's two shapes: that of completions and that of chats.

They are made as JSON text, piece by piece as tokens come: an answer can have a million of them, and encoding
these at its end would hold up every other stream.
"""

import json
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from pdserve.core.errors import InvalidRequest
from pdserve.proto import inference_pb2 as pb
from pdserve.router.openai.fields import Shown

LEAST = -9999.0
"""JSON has no infinity; OpenAI uses this number for what can never come."""
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Decodes(Protocol):
    """The part of a tokenizer that shows tokens."""

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str: ...


class TopLogprobShown(Shown):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprobShown(TopLogprobShown):
    top_logprobs: list[TopLogprobShown]


class ChatLogprobsShown(Shown):
    content: list[TokenLogprobShown] | None
    refusal: None


class CompletionLogprobsShown(Shown):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TokenTexts:
    """What single tokens of one model look like. Remembered: there are no more than its vocabulary has."""

    def __init__(self, tokenizer: Decodes | None) -> None:
        """None where the router has no tokenizer for the model: tokens are shown by their ids then."""
        self._tokenizer = tokenizer
        self._texts: dict[int, str] = {}

    def text(self, token: int) -> str:
        """Part of a character is shown as a replacement character; an id without a text by its number."""
        known = self._texts.get(token)
        if known is None:
            known = self._decode(token)
            if self._tokenizer is not None:
                self._texts[token] = known
        return known

    def _decode(self, token: int) -> str:
        if self._tokenizer is not None:
            try:
                # Alone, it would lose the space that some tokenizers drop at the beginning of a text.
                alone = self._tokenizer.decode([token], skip_special=False)
                return self._tokenizer.decode([token, token], skip_special=False)[len(alone) :]
            except InvalidRequest:  # an id of the model's padding, outside the tokenizer's vocabulary
                pass
        return f"token_id:{token}"


class ChatLogprobs:
    """`{"content": [{token, logprob, bytes, top_logprobs}], "refusal": null}`."""

    def __init__(self, texts: TokenTexts) -> None:
        self._texts = texts

    def piece(self, positions: Sequence[pb.PositionLogprobs]) -> str:
        """JSON of what these positions add to the content, without brackets."""
        return _inside(
            [
                {**self._entry(position.sampled), "top_logprobs": [self._entry(top) for top in position.top]}
                for position in positions
            ]
        )

    @staticmethod
    def join(pieces: Iterable[str]) -> str:
        """JSON of the whole object."""
        return f'{{"content":[{",".join(filter(None, pieces))}],"refusal":null}}'

    def _entry(self, token: pb.TokenLogprob) -> dict[str, Any]:
        text = self._texts.text(token.token_id)
        whole = _REPLACEMENT not in text
        return {
            "token": text,
            "logprob": max(LEAST, token.logprob),
            "bytes": list(text.encode()) if whole else None,
        }


class CompletionLogprobs:
    """`{tokens, token_logprobs, top_logprobs, text_offset}` of one choice, piece by piece."""

    NAMES = ("tokens", "token_logprobs", "top_logprobs", "text_offset")

    def __init__(self, texts: TokenTexts) -> None:
        self._texts = texts
        self._offset = 0

    def piece(self, positions: Sequence[pb.PositionLogprobs]) -> tuple[str, ...]:
        """JSON of what these positions add to each of the lists, without brackets, in the order of NAMES."""
        tokens = [self._texts.text(position.sampled.token_id) for position in positions]
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(token)
        values = [max(LEAST, position.sampled.logprob) for position in positions]
        tops = [self._top(position) for position in positions]
        return _inside(tokens), _inside(values), _inside(tops), _inside(offsets)

    @classmethod
    def join(cls, pieces: Sequence[tuple[str, ...]]) -> str:
        """JSON of the whole object."""
        lists = (",".join(piece[at] for piece in pieces if piece[at]) for at in range(len(cls.NAMES)))
        return (
            "{"
            + ",".join(f'"{name}":[{inside}]' for name, inside in zip(cls.NAMES, lists, strict=True))
            + "}"
        )

    def _top(self, position: pb.PositionLogprobs) -> dict[str, float]:
        """The likeliest ones and the sampled one. Of tokens with the same text the likelier one is shown."""
        top: dict[str, float] = {}
        for entry in (*position.top, position.sampled):
            top.setdefault(self._texts.text(entry.token_id), max(LEAST, entry.logprob))
        return top


def _inside(values: Sequence[Any]) -> str:
    return json.dumps(values, ensure_ascii=False, separators=(",", ":"))[1:-1]
