"""OpenAI's messages and tools to the chat that the model's template renders."""

import json

from pdserve.proto import inference_pb2 as pb
from pdserve.router.openai.chat_schema import ChatRequest, Message
from pdserve.router.openai.errors import BadField


def chat_of(fields: ChatRequest) -> pb.ChatMessages:
    """Raises BadField for what a text model cannot read. With tool_choice none, the model sees no tools."""
    tools = "" if fields.tool_choice == "none" or not fields.tools else _tools_json(fields)
    messages = [_message(number, message) for number, message in enumerate(fields.messages)]
    return pb.ChatMessages(messages=messages, tools_json=tools)


def _tools_json(fields: ChatRequest) -> str:
    tools = [tool.model_dump(exclude_none=True) for tool in fields.tools or ()]
    return json.dumps(tools, ensure_ascii=False)


def _message(number: int, message: Message) -> pb.ChatMessage:
    content = _content(f"messages.{number}.content", message)
    calls = [call.model_dump() for call in message.tool_calls or ()]
    return pb.ChatMessage(
        # Templates know the role by its older name.
        role="system" if message.role == "developer" else message.role,
        content=content,
        name=message.name or "",
        tool_call_id=message.tool_call_id or "",
        tool_calls_json=json.dumps(calls, ensure_ascii=False) if calls else "",
    )


def _content(path: str, message: Message) -> str:
    if message.content is None:
        if message.role != "assistant":
            raise BadField(path, f"{path} is missing: a message of role {message.role} needs one")
        return ""
    if isinstance(message.content, str):
        return message.content
    texts: list[str] = []
    for number, part in enumerate(message.content):
        text = {"text": part.text, "refusal": part.refusal}.get(part.type)
        if text is None:
            why = "has no text" if part.type in ("text", "refusal") else f"is of type {part.type[:64]!r}"
            raise BadField(f"{path}.{number}", f"{path}.{number} {why}: this model reads text parts only")
        texts.append(text)
    return "\n".join(texts)
