"""The types of replies in Anthropic's dialect, for the OpenAPI document."""

from __future__ import annotations

from typing import Any, Literal

from typing_extensions import TypedDict

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class AnthropicError(TypedDict):
    """What is wrong."""

    type: str
    message: str


class AnthropicErrorBody(TypedDict):
    """The body of an error, and the last event of a stream that fails."""

    type: Literal["error"]
    error: AnthropicError


class AnthropicUsage(TypedDict):
    """Tokens that a request used. input_tokens are those that no cache held."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int


class AnswerText(TypedDict):
    """Text of an answer."""

    type: Literal["text"]
    text: str


class AnswerToolUse(TypedDict):
    """A call of a tool."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class AnthropicMessage(TypedDict):
    """An answer."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[AnswerText | AnswerToolUse]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: AnthropicUsage


class MessageStart(TypedDict):
    """The first event of a stream."""

    type: Literal["message_start"]
    message: AnthropicMessage


class Ping(TypedDict):
    """An event without news."""

    type: Literal["ping"]


class ContentBlockStart(TypedDict):
    """A block begins."""

    type: Literal["content_block_start"]
    index: int
    content_block: AnswerText | AnswerToolUse


class TextDelta(TypedDict):
    """New text of a block."""

    type: Literal["text_delta"]
    text: str


class InputJsonDelta(TypedDict):
    """New JSON text of a call's input."""

    type: Literal["input_json_delta"]
    partial_json: str


class ContentBlockDelta(TypedDict):
    """A block grows."""

    type: Literal["content_block_delta"]
    index: int
    delta: TextDelta | InputJsonDelta


class ContentBlockStop(TypedDict):
    """A block is whole."""

    type: Literal["content_block_stop"]
    index: int


class Stop(TypedDict):
    """Why an answer ended."""

    stop_reason: StopReason
    stop_sequence: str | None


class MessageDelta(TypedDict):
    """The end of the answer."""

    type: Literal["message_delta"]
    delta: Stop
    usage: AnthropicUsage


class MessageStop(TypedDict):
    """The last event of a stream."""

    type: Literal["message_stop"]


MessageEvent = (
    MessageStart
    | Ping
    | ContentBlockStart
    | ContentBlockDelta
    | ContentBlockStop
    | MessageDelta
    | MessageStop
    | AnthropicErrorBody
)


class TokenCount(TypedDict):
    """The length of a prompt."""

    input_tokens: int
