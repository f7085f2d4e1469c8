"""The messages of Anthropic's API, and the dialog that they are.

A message's content is text or a list of blocks. A result of a tool is a block of the user's message there, and a
message of its own in a dialog. Successive messages of one role are one turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Discriminator, FailFast, Tag
from pydantic_core import PydanticCustomError

from llama_tp.serving.dialects.tools import ToolName, tool_call
from llama_tp.serving.dialects.unsupported import IGNORED
from llama_tp.serving.errors import ApiError
from llama_tp.serving.fields import ABSENT, must_be_text
from llama_tp.serving.strict_model import StrictModel
from llama_tp.text.dialog import Json, Message


class _Block(StrictModel):
    cache_control: IGNORED = ABSENT


class TextBlock(_Block):
    """Text of either side."""

    type: Literal["text"]
    text: str
    citations: IGNORED = ABSENT


class ThinkingBlock(_Block):
    """The assistant's reasoning in an earlier answer."""

    type: Literal["thinking"]
    thinking: str
    signature: IGNORED = ABSENT


class RedactedThinkingBlock(_Block):
    """Reasoning that only its author can read."""

    type: Literal["redacted_thinking"]
    data: IGNORED = ABSENT


def _an_object(value: object) -> Json:
    if not isinstance(value, dict):
        raise PydanticCustomError("invalid_type", "must be an object")
    return value


class ToolUseBlock(_Block):
    """The assistant's call of a tool."""

    type: Literal["tool_use"]
    id: str
    name: ToolName
    input: Annotated[Any, AfterValidator(_an_object)]
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


_AsBlocks = BeforeValidator(_blocks)


def _only_text(block: object) -> object:
    if _kind(block) != "text":
        raise PydanticCustomError(
            "unsupported_value", "is not a block of type text, the only one that is supported here"
        )
    return block


Texts = Annotated[list[Annotated[TextBlock, BeforeValidator(_only_text)]], FailFast(), _AsBlocks]
"""Text, or blocks of text."""


class ToolResultBlock(_Block):
    """What a tool answered."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: Texts = ABSENT
    is_error: bool = False
    toolset_name: IGNORED = ABSENT


_AnyBlock = Annotated[
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
    content: Annotated[list[_AnyBlock], FailFast(), _AsBlocks]


def joined(texts: Sequence[TextBlock]) -> str:
    """The text of blocks, joined by newlines as in OpenAI's dialect."""
    return "\n".join(block.text for block in texts)


@dataclass(slots=True)
class _Turn:
    """What a role says before another does, or before a tool's result."""

    role: str
    path: str
    """Where it begins in the body."""
    texts: list[str] = field(default_factory=list)
    thoughts: list[str] = field(default_factory=list)
    calls: list[Json] = field(default_factory=list)
    tool_use_id: str | None = None
    """With the role "tool"."""
    name: str | None = None
    """The tool's."""

    def message(self) -> Message:
        return Message(
            self.role,
            "\n".join(self.texts),
            tool_calls=tuple(self.calls),
            tool_call_id=self.tool_use_id,
            name=self.name,
            reasoning_content="\n".join(self.thoughts) if self.thoughts else None,
        )


class Dialog:
    """The dialog that messages are, and where each of its turns begins in the body."""

    def __init__(self, system: Sequence[TextBlock] | None, messages: Sequence[InputMessage]) -> None:
        """ApiError for a block in a message of the wrong role, and for a result of a call that was not made."""
        self._turns: list[_Turn] = []
        self._tools: dict[str, str] = {}
        if system:
            self._turns.append(_Turn("system", "system", [joined(system)]))
        for index, message in enumerate(messages):
            self._add(message, f"messages[{index}]")

    @property
    def messages(self) -> tuple[Message, ...]:
        return tuple(turn.message() for turn in self._turns)

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(turn.path for turn in self._turns)

    def _add(self, message: InputMessage, path: str) -> None:
        if not message.content:
            self._turn(message.role, path)
        for at, block in enumerate(message.content):
            if (speaker := _SPEAKERS.get(block.type, message.role)) != message.role:
                problem = f"{path}.content[{at}] is a block of type {block.type}, which only the {speaker} sends"
                raise ApiError(400, "invalid_role", problem, f"{path}.content[{at}]")
            if isinstance(block, ToolResultBlock):
                self._turns.append(self._result(block, f"{path}.content[{at}]"))
            elif not isinstance(block, RedactedThinkingBlock):
                self._say(self._turn(message.role, path), block)

    def _say(self, turn: _Turn, block: TextBlock | ThinkingBlock | ToolUseBlock) -> None:
        if isinstance(block, TextBlock):
            turn.texts.append(block.text)
        elif isinstance(block, ThinkingBlock):
            turn.thoughts.append(block.thinking)
        else:
            turn.calls.append(tool_call(block.id, block.name, block.input))
            self._tools[block.id] = block.name

    def _turn(self, role: str, path: str) -> _Turn:
        """The turn that a message of this role continues or begins."""
        if not self._turns or self._turns[-1].role != role:
            self._turns.append(_Turn(role, path))
        return self._turns[-1]

    def _result(self, block: ToolResultBlock, path: str) -> _Turn:
        name = self._tools.get(block.tool_use_id)
        if name is None:
            problem = f"{path}.tool_use_id is not the id of a tool_use in an earlier message"
            raise ApiError(400, "invalid_value", problem, f"{path}.tool_use_id")
        text = joined(block.content or [])
        return _Turn(
            "tool", path, [f"Error: {text}" if block.is_error else text], tool_use_id=block.tool_use_id, name=name
        )
