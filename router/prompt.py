"""What a client may send as a prompt."""

from dataclasses import dataclass

from pdserve.core.text.chat_template import ChatMessage


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation, which the model's chat template turns into tokens."""

    messages: tuple[ChatMessage, ...]
    tools_json: str = ""
    """A JSON array of OpenAI tool definitions; empty: none."""


@dataclass(frozen=True, slots=True)
class TokenIds:
    """A prompt that the client tokenized itself."""

    ids: tuple[int, ...]


Prompt = str | Chat | TokenIds
"""What a client may send."""


def prompt_bytes(prompt: Prompt) -> int:
    """Size for the limit on prompts: UTF-8 bytes, or four per token id."""
    match prompt:
        case TokenIds(ids):
            return 4 * len(ids)
        case Chat(messages, tools_json):
            texts = (
                text
                for m in messages
                for text in (m.role, m.content, m.name, m.tool_call_id, m.tool_calls_json)
            )
            return _bytes(tools_json) + sum(map(_bytes, texts))
        case text:
            return _bytes(text)


def _bytes(text: str) -> int:
    return len(text.encode(errors="surrogatepass"))
