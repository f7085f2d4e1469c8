"""The messages of Anthropic's API, and the dialog that they are.

A message's content is text or a list of blocks. A result of a tool is a block of the user's message there, and a
message of its own in a dialog. Successive messages of one role are one turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Discriminator, FailFast, Tag, WithJsonSchema
from pydantic_core import PydanticCustomError

from llama_tp.serving.dialects.tools import ToolName
from llama_tp.serving.dialects.turns import Turns
from llama_tp.serving.dialects.unsupported import IGNORED
from llama_tp.serving.errors import ApiError
from llama_tp.serving.fields import ABSENT, must_be_text
from llama_tp.serving.strict_model import StrictModel
from llama_tp.text.dialog import Json


class _Block(StrictModel):
    cache_control: IGNORED = ABSENT


class TextBlock(_Block):
    """Text of either side."""

    type: Literal["text"]
    """text"""
    text: str
    """The text."""
    citations: IGNORED = ABSENT


class ThinkingBlock(_Block):
    """The assistant's reasoning in an earlier answer."""

    type: Literal["thinking"]
    """thinking"""
    thinking: str
    """The text of it."""
    signature: IGNORED = ABSENT


class RedactedThinkingBlock(_Block):
    """Reasoning that only its author can read."""

    type: Literal["redacted_thinking"]
    """redacted_thinking"""
    data: IGNORED = ABSENT


def _an_object(value: object) -> Json:
    if not isinstance(value, dict):
        raise PydanticCustomError("invalid_type", "must be an object")
    return value


class ToolUseBlock(_Block):
    """The assistant's call of a tool."""

    type: Literal["tool_use"]
    """tool_use"""
    id: str
    """The call's, to which the result refers."""
    name: ToolName
    input: Annotated[Any, AfterValidator(_an_object), WithJsonSchema({"type": "object"})]
    """The arguments."""
    caller: IGNORED = ABSENT
    toolset_name: IGNORED = ABSENT


def _kind(block: object) -> object:
    """Its type. What is no object, or has no type, counts as text, whose check reports that."""
    return block.get("type", "text") if isinstance(block, dict) else "text"


def _tag(block: object) -> str:
    """Unlike any field: it occurs in pydantic's locations of errors."""
    kind = _kind(block)
    return f"a {kind if isinstance(kind, str) else 'text'} block"


def _blocks(content: object) -> object:
    """A content as a list of blocks."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise PydanticCustomError("invalid_type", "must be a string or a list of blocks")
    return content


def _only_text(block: object) -> object:
    if _kind(block) != "text":
        raise PydanticCustomError(
            "unsupported_value", "is not a block of type text, the only one that is supported here"
        )
    return block


Texts = Annotated[
    list[Annotated[TextBlock, BeforeValidator(_only_text)]],
    FailFast(),
    BeforeValidator(_blocks, json_schema_input_type=str | list[TextBlock]),
]
"""Text, or blocks of text."""


class ToolResultBlock(_Block):
    """What a tool answered."""

    type: Literal["tool_result"]
    """tool_result"""
    tool_use_id: str
    """The id of an earlier tool_use."""
    content: Texts = ABSENT
    """The result."""
    is_error: bool = False
    """Whether the tool failed."""
    toolset_name: IGNORED = ABSENT


AnyBlock = Annotated[
    Annotated[TextBlock, Tag("a text block")]
    | Annotated[ThinkingBlock, Tag("a thinking block")]
    | Annotated[RedactedThinkingBlock, Tag("a redacted_thinking block")]
    | Annotated[ToolUseBlock, Tag("a tool_use block")]
    | Annotated[ToolResultBlock, Tag("a tool_result block")],
    Discriminator(
        _tag,
        custom_error_type="unsupported_value",
        custom_error_message="is not a block of a supported type: text, thinking, tool_use, tool_result",
    ),
]
_SPEAKERS = {"tool_result": "user", "tool_use": "assistant", "thinking": "assistant", "redacted_thinking": "assistant"}
"""The only role whose messages may have such a block."""


class InputMessage(StrictModel):
    """A message of a request."""

    role: Annotated[Literal["user", "assistant", "system"], BeforeValidator(must_be_text)]
    """Who speaks."""
    content: Annotated[
        list[AnyBlock], FailFast(), BeforeValidator(_blocks, json_schema_input_type=str | list[AnyBlock])
    ]
    """Text, or blocks. tool_result is the user's; tool_use and thinking are the assistant's."""


def joined(texts: Sequence[TextBlock]) -> str:
    """The text of blocks, joined by newlines as in OpenAI's dialect."""
    return "\n".join(block.text for block in texts)


def turns_of(system: Sequence[TextBlock] | None, messages: Sequence[InputMessage]) -> Turns:
    """The dialog that a request has. ApiError for a block in a message of the wrong role, and for a result of a call
    that was not made."""
    turns = Turns()
    if system:
        turns.new("system", "system").texts.append(joined(system))
    for index, message in enumerate(messages):
        path = f"messages[{index}]"
        if not message.content:
            turns.same(message.role, path)
        for at, block in enumerate(message.content):
            if (speaker := _SPEAKERS.get(block.type, message.role)) != message.role:
                problem = f"{path}.content[{at}] is a block of type {block.type}, which only the {speaker} sends"
                raise ApiError(400, "invalid_role", problem, f"{path}.content[{at}]")
            _add(turns, message.role, block, path, at)
    return turns


def _add(turns: Turns, role: str, block: AnyBlock, path: str, at: int) -> None:
    if isinstance(block, TextBlock):
        turns.same(role, path).texts.append(block.text)
    elif isinstance(block, ThinkingBlock):
        turns.same(role, path).thoughts.append(block.thinking)
    elif isinstance(block, ToolUseBlock):
        turns.call(path, block.id, block.name, block.input)
    elif isinstance(block, ToolResultBlock):
        text = joined(block.content or [])
        text = f"Error: {text}" if block.is_error else text
        turns.result(f"{path}.content[{at}]", block.tool_use_id, text, id_name="tool_use_id")
