"""The input of a response: text, or items, and the dialog that they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, FailFast, StringConstraints, Tag, WithJsonSchema, conlist
from pydantic_core import PydanticCustomError

from llama_tp.serving.dialects.tools import Arguments, ToolName
from llama_tp.serving.dialects.turns import Turns
from llama_tp.serving.dialects.unsupported import IGNORED
from llama_tp.serving.fields import ABSENT, FewMessages, must_be_text
from llama_tp.serving.strict_model import StrictModel

_ROLES = {"developer": "system"}
"""Roles that chat formats know by another name."""
_PARTS = ("input_text", "output_text", "text")


class ContentPart(StrictModel):
    """Text of either side."""

    type: Annotated[str, WithJsonSchema({"enum": list(_PARTS)})]
    """Parts of other types are refused."""
    text: str
    """The text."""
    annotations: IGNORED = ABSENT
    logprobs: IGNORED = ABSENT
    prompt_cache_breakpoint: IGNORED = ABSENT


def _only_text(part: object) -> object:
    """Parts of other types have other fields, too: their type is refused before these are."""
    if isinstance(part, dict) and part.get("type", "text") not in _PARTS:
        problem = "is not a part of a supported type: input_text, output_text"
        raise PydanticCustomError("unsupported_value", problem)
    return part


def _parts(content: object) -> object:
    """A content as a list of parts."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise PydanticCustomError("invalid_type", "must be a string or a list of parts")
    return content


def _joined(parts: Sequence[ContentPart]) -> str:
    """By newlines, as in chats."""
    return "\n".join(part.text for part in parts)


_Content = Annotated[
    list[Annotated[ContentPart, BeforeValidator(_only_text)]],
    FailFast(),
    BeforeValidator(_parts, json_schema_input_type=str | list[ContentPart]),
]
"""Text, or parts of text."""


class MessageItem(StrictModel):
    """What somebody said."""

    role: Annotated[Literal["user", "assistant", "system", "developer"], BeforeValidator(must_be_text)]
    """Who speaks."""
    content: _Content
    """Text, or parts of text."""
    type: Annotated[str, WithJsonSchema({"const": "message"})] = "message"
    """message"""
    id: IGNORED = ABSENT
    status: IGNORED = ABSENT
    phase: IGNORED = ABSENT


class FunctionCallItem(StrictModel):
    """The assistant's call of a function."""

    type: Annotated[str, WithJsonSchema({"const": "function_call"})]
    """function_call"""
    call_id: str
    """The call's, to which the result refers."""
    name: ToolName
    arguments: Arguments
    id: IGNORED = ABSENT
    status: IGNORED = ABSENT
    caller: IGNORED = ABSENT
    namespace: IGNORED = ABSENT


class FunctionCallOutputItem(StrictModel):
    """What a function answered."""

    type: Annotated[str, WithJsonSchema({"const": "function_call_output"})]
    """function_call_output"""
    call_id: str
    """The call_id of an earlier function_call."""
    output: _Content
    """The result: text, or parts of text."""
    id: IGNORED = ABSENT
    status: IGNORED = ABSENT
    caller: IGNORED = ABSENT
    name: IGNORED = ABSENT
    namespace: IGNORED = ABSENT


class ReasoningItem(StrictModel):
    """Another model's reasoning, which is not passed on."""

    type: Annotated[str, WithJsonSchema({"const": "reasoning"})]
    """reasoning"""
    id: IGNORED = ABSENT
    summary: IGNORED = ABSENT
    content: IGNORED = ABSENT
    encrypted_content: IGNORED = ABSENT
    status: IGNORED = ABSENT


def _tag(item: object) -> str:
    """Unlike any field: it occurs in pydantic's locations of errors. What has no type is a message."""
    kind = item.get("type", "message") if isinstance(item, dict) else "message"
    return f"a {kind if isinstance(kind, str) else 'message'} item"


Item = Annotated[
    Annotated[MessageItem, Tag("a message item")]
    | Annotated[FunctionCallItem, Tag("a function_call item")]
    | Annotated[FunctionCallOutputItem, Tag("a function_call_output item")]
    | Annotated[ReasoningItem, Tag("a reasoning item")],
    Discriminator(
        _tag,
        custom_error_type="unsupported_value",
        custom_error_message="is not an item of a supported type: message, function_call, function_call_output",
    ),
]


def _items(value: object) -> object:
    """An input as a list of items."""
    if isinstance(value, str):
        value = [{"role": "user", "content": value}] if value else []
    if not isinstance(value, list):
        raise PydanticCustomError("invalid_type", "must be a string or a list of items")
    if not value:
        raise PydanticCustomError("empty_prompt", "must not be empty")
    return value


_Some: Any = conlist(Item, min_length=1)  # type: ignore[arg-type]  # a union is a type, too
_SomeText = Annotated[str, StringConstraints(min_length=1)]
Input = Annotated[
    list[Item], FailFast(), BeforeValidator(_items, json_schema_input_type=_SomeText | _Some), FewMessages
]
"""Text, or items."""


def turns_of(instructions: str | None, items: Sequence[Item]) -> Turns:
    """The dialog that a request has. ApiError for the result of a call that was not made."""
    turns = Turns()
    if instructions is not None:
        turns.new("system", "instructions").texts.append(instructions)
    for index, item in enumerate(items):
        path = f"input[{index}]"
        if isinstance(item, MessageItem):
            role = _ROLES.get(item.role, item.role)
            turn = turns.same(role, path) if role == "system" else turns.new(role, path)
            turn.texts.append(_joined(item.content))
        elif isinstance(item, FunctionCallItem):
            turns.call(path, item.call_id, item.name, item.arguments)
        elif isinstance(item, FunctionCallOutputItem):
            turns.result(path, item.call_id, _joined(item.output), id_name="call_id")
    return turns
