"""Tools and tool calls in requests, checked once for all dialects. They leave here in the form of OpenAI's chats.

    {"type": "function", "function": {"name": "add", "description": "...", "parameters": {"type": "object", ...}}}
    {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}

The arguments of a call are an object here: templates read them so, see `Message.tool_calls`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, FailFast, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from llama_tp.serving.encoding import shown
from llama_tp.serving.errors import ApiError
from llama_tp.serving.fields import ABSENT, AtMost
from llama_tp.serving.strict_json import parse_json
from llama_tp.serving.strict_model import StrictModel
from llama_tp.text.dialog import Json
from llama_tp.text.tools.calls import ToolChoice

MAX_TOOLS = 128
"""OpenAI's limit."""
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")
"""OpenAI's characters and Anthropic's length: names of MCP tools have over 64 characters."""


def _tool_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise PydanticCustomError("invalid_value", "must have 1 to 128 letters (a to z), digits, '_', '-' and '.'")
    return name


def _object_schema(value: object) -> Json:
    """A JSON schema of objects."""
    schema = _any_schema(value)
    if schema.get("type", "object") != "object":
        raise PydanticCustomError("invalid_value", 'must be "object": arguments have names', {"at": "type"})
    return schema


def _arguments(text: str) -> Json:
    """The arguments of a call from their JSON text. A call without arguments may have an empty text."""
    if not text.strip():
        return {}
    try:
        return parse_json(text)
    except ApiError:
        raise PydanticCustomError("invalid_value", "must be the JSON text of an object") from None


def _any_schema(schema: object) -> Json:
    if not isinstance(schema, dict):
        raise PydanticCustomError("invalid_type", 'must be a JSON schema such as {"type": "object"}')
    return schema


def _only_functions(kind: object) -> object:
    if not isinstance(kind, str):
        raise PydanticCustomError("invalid_type", "must be a string")
    if kind != "function":
        raise PydanticCustomError("unsupported_value", 'is not supported; the only type of tools is "function"')
    return kind


_NAMES = {"type": "string", "pattern": f"^{_NAME.pattern}$"}
ToolName = Annotated[str, AfterValidator(_tool_name), Field(description="The tool's name."), WithJsonSchema(_NAMES)]
ObjectSchema = Annotated[
    Any,
    AfterValidator(_object_schema),
    Field(description="The JSON schema of the arguments."),
    WithJsonSchema({"type": "object", "properties": {"type": {"const": "object"}}}),
]
Arguments = Annotated[
    str,
    AfterValidator(_arguments),
    Field(description="JSON text of an object, or an empty text."),
    WithJsonSchema({"type": "string", "contentMediaType": "application/json", "contentSchema": {"type": "object"}}),
]
"""Parsed, it is the object."""
FunctionType = Annotated[
    str,
    BeforeValidator(_only_functions),
    Field(description="Tools of other types are refused."),
    WithJsonSchema({"const": "function"}),
]
Few = AtMost(MAX_TOOLS)
"""For a list of tools."""


class FunctionDefinition(StrictModel):
    """A function that the assistant may call, as OpenAI's APIs describe it."""

    name: ToolName
    description: str = ABSENT
    """What it does, for the model."""
    parameters: ObjectSchema = ABSENT
    strict: bool = ABSENT
    """Ignored: `tool_choice` decides whether arguments are constrained."""

    def tool(self) -> Json:
        return function_tool(self.name, self.description, self.parameters)


class ChatTool(StrictModel):
    """A function in the list of tools of OpenAI's chats."""

    type: FunctionType
    function: FunctionDefinition
    """The function."""


class CalledFunction(StrictModel):
    """A function, and what it was called with."""

    name: ToolName
    arguments: Arguments


class ChatToolCall(StrictModel):
    """A call in an assistant's message of OpenAI's chats."""

    id: str
    """The call's, to which the result refers."""
    type: FunctionType = "function"
    function: CalledFunction
    """The function."""
    index: int = ABSENT
    """Ignored: clients that add up a stream's deltas send it back."""

    def call(self) -> Json:
        return tool_call(self.id, self.function.name, self.function.arguments)


def function_tool(name: str, description: str | None, parameters: Json | None) -> Json:
    """A tool in the form of OpenAI's chats."""
    function = {"name": name, "description": description, "parameters": parameters}
    return {"type": "function", "function": {key: value for key, value in function.items() if value is not None}}


def tool_call(call_id: str, name: str, arguments: Any) -> Json:
    """A call in the form that templates read. `arguments`: an object."""
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def unique_tools(tools: Sequence[Json]) -> tuple[Json, ...]:
    """The tools. PydanticCustomError for the first whose name another has already."""
    seen = set()
    for at, tool in enumerate(tools):
        if (name := tool["function"]["name"]) in seen:
            raise PydanticCustomError("invalid_value", "has the name of another tool; names must differ", {"at": at})
        seen.add(name)
    return tuple(tools)


def _chat_tools(tools: list[ChatTool]) -> tuple[Json, ...]:
    return unique_tools([tool.function.tool() for tool in tools])


def _chat_tool_calls(calls: list[ChatToolCall]) -> tuple[Json, ...]:
    return tuple(call.call() for call in calls)


ChatTools = Annotated[
    list[ChatTool],
    FailFast(),
    Few,
    AfterValidator(_chat_tools),
    Field(description="The functions that the assistant may call; their names differ."),
]
"""The tools of a request to OpenAI's chats; parsed, a tuple of `Json`."""
ChatToolCalls = Annotated[list[ChatToolCall], FailFast(), AfterValidator(_chat_tool_calls)]
"""The calls of an assistant's message in OpenAI's chats; parsed, a tuple of `Json`."""


def call_id(prefix: str, request_id: str, *, output: int = 0, call: int) -> str:
    """The id of an answer's call: the same in a stream and in the whole answer, different in every other answer."""
    digest = hashlib.sha256(f"{request_id} {output} {call}".encode()).hexdigest()
    return f"{prefix}{digest[:24]}"


def check_choice(choice: ToolChoice, tools: Sequence[Json], param: str) -> None:
    """ApiError if the tools cannot be called as `param`, the field of the choice, demands."""
    if choice.mode != "required":
        return
    names = [tool["function"]["name"] for tool in tools]
    if not names:
        raise ApiError(400, "conflicting_fields", f"{param} demands a call, but the request has no tools", param)
    if choice.name is not None and choice.name not in names:
        message = f"{param} names {shown(choice.name)}, which is not one of the tools: {', '.join(names)}"
        raise ApiError(400, "invalid_value", message, param)
