"""What tool_choice asks of the answer, as a constraint where it demands a call."""

import json
from collections.abc import Sequence
from typing import Any

from pdserve.core.types import Constraint, ConstraintKind
from pdserve.router.openai.chat_schema import ChatRequest, NamedTool, Tool
from pdserve.router.openai.errors import BadField

_DEFINITIONS = ("$defs", "definitions")


def may_call(fields: ChatRequest) -> bool:
    """Whether calls are to be looked for in the answer."""
    return bool(fields.tools) and fields.tool_choice != "none"


def demanded(fields: ChatRequest) -> Sequence[Tool]:
    """The tools of which one must be called: none for `none` and `auto`. Raises BadField."""
    choice, tools = fields.tool_choice, fields.tools or []
    if choice in (None, "none"):
        return ()
    if not tools:
        raise BadField("tool_choice", "tool_choice is set and tools are not: send tools, or leave it out")
    if isinstance(choice, NamedTool):
        found = [tool for tool in tools if tool.function.name == choice.function.name]
        if not found:
            known = ", ".join(tool.function.name for tool in tools)
            raise BadField(
                "tool_choice", f"tool_choice names {choice.function.name!r}: tools has only {known}"
            )
        return found[:1]
    return tools if choice == "required" else ()


def call_constraint(tools: Sequence[Tool]) -> Constraint:
    """The answer is one call of one of `tools`: `{"name": …, "arguments": {…}}`.

    Definitions that the parameters refer to move to the root, where their references look for them. Raises
    BadField when two tools define different things by one name.
    """
    definitions: dict[str, dict[str, Any]] = {}
    calls = [_call_schema(tool, definitions) for tool in tools]
    schema = calls[0] if len(calls) == 1 else {"anyOf": calls}
    return Constraint(ConstraintKind.JSON_SCHEMA, json.dumps({**schema, **definitions}))


def _call_schema(tool: Tool, definitions: dict[str, dict[str, Any]]) -> dict[str, Any]:
    parameters = dict(tool.function.parameters or {"type": "object", "properties": {}})
    parameters.setdefault("type", "object")
    for place in _DEFINITIONS:
        for name, schema in (parameters.pop(place, None) or {}).items():
            there = definitions.setdefault(place, {})
            if there.setdefault(name, schema) != schema:
                raise BadField("tools", f"two tools define {place}/{name} differently: rename one of them")
    return {
        "type": "object",
        "properties": {"name": {"const": tool.function.name}, "arguments": parameters},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }
