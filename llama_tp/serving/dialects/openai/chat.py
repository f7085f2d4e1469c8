"""The dialect of v1/chat/completions.

{"messages": [{"role": "user", "content": "Hi"}], "max_completion_tokens": 50, "stream": true}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, FailFast, Field, WithJsonSchema, create_model, model_validator
from pydantic_core import PydanticCustomError
from typing_extensions import Self

from llama_tp.serving.dialects.base import Accepted
from llama_tp.serving.dialects.openai.replies import ChatReplies
from llama_tp.serving.dialects.openai.request import Given, Route, SharedFields, given_in, text_or_refusal
from llama_tp.serving.dialects.openai.types import ChatCompletion, ChatCompletionChunk
from llama_tp.serving.dialects.openai.unsupported import CHAT
from llama_tp.serving.dialects.route import Names
from llama_tp.serving.dialects.tools import ChatToolCalls, ChatTools, check_choice
from llama_tp.serving.dialects.unsupported import IGNORED, only
from llama_tp.serving.errors import ApiError, ErrorBody
from llama_tp.serving.fields import ABSENT, MAX_NEW_TOKENS, FewMessages, MaxNewTokensOrNone, TopLogprobs
from llama_tp.serving.generation import FieldNames, GenerationRequest, RequestDefaults
from llama_tp.serving.operation import Operation
from llama_tp.serving.strict_model import StrictModel
from llama_tp.text.dialog import Message
from llama_tp.text.tokenizer import Tokenizer
from llama_tp.text.tools.calls import ToolChoice

_NAMES = FieldNames(dialog="messages", max_new_tokens="max_tokens", min_new_tokens="min_tokens")
_NEWER_NAMES = replace(_NAMES, max_new_tokens="max_completion_tokens")
_ROLES = {"developer": "system"}
"""Roles that chat formats know by another name."""


class ChatDialect:
    """The Dialect of v1/chat/completions."""

    def __init__(self, defaults: RequestDefaults, names: Names) -> None:
        self._route = Route.of(defaults, names, max_tokens=MAX_NEW_TOKENS)  # clipped to what fits the context

    @property
    def operation(self) -> Operation:
        return Operation(
            id="create_chat_completion",
            summary="Answer a chat, as OpenAI's API does.",
            body=_Body,
            answer=ChatCompletion,
            chunk=ChatCompletionChunk | ErrorBody,
            chunk_type=ChatReplies.chunk_type,
        )

    def parse(self, body: object) -> GenerationRequest:
        fields = self._route.validate(_Body, body)
        given = given_in(fields)
        _check_pairs(given)
        names = _NEWER_NAMES if "max_completion_tokens" in given else _NAMES
        tools, choice = given.get("tools", ()), given.get("tool_choice", ToolChoice())
        check_choice(choice, tools, "tool_choice")
        return self._route.request(
            given,
            names,
            logprobs=given.get("top_logprobs", 0) if given.get("logprobs") else None,
            dialog=given["messages"],
            continue_final_message=given.get("continue_final_message", False),
            tools=tools,
            tool_choice=replace(choice, parallel=given.get("parallel_tool_calls", True)) if tools else ToolChoice(),
            add_generation_prompt=given.get("add_generation_prompt", True),
            template_variables=given.get("chat_template_kwargs", {}),
        )

    def replies(self, accepted: Accepted, tokenizer: Tokenizer, longest_token: int) -> ChatReplies:
        return ChatReplies(accepted, self._route.model_name, tokenizer, longest_token)

    def error(self, error: ApiError) -> bytes:
        return error.body()


def _text(content: object) -> str:
    """Parts of a content are joined by newlines, as in vLLM."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise PydanticCustomError("invalid_type", "must be a string or a list of parts of type text")
    texts = []
    for at, part in enumerate(content):
        try:
            texts.append(text_or_refusal(part))
        except PydanticCustomError as error:
            raise PydanticCustomError(error.type, error.message_template, {"at": at}) from None
    return "\n".join(texts)


_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
}
_CONTENT = {"anyOf": [{"type": "string"}, {"type": "array", "items": _PART}]}


class ChatMessage(StrictModel):
    """One turn of a chat."""

    role: str
    """system, developer, user, assistant or tool, unless the chat format knows others."""
    content: Annotated[Any, AfterValidator(_text), WithJsonSchema(_CONTENT)] = ABSENT
    """Text, or parts of text, which are joined by newlines. Required unless the message calls tools."""
    name: str = ABSENT
    """The speaker's name, for chat templates that use it."""
    tool_call_id: str = ABSENT
    """The call that a message with the role tool answers."""
    reasoning_content: str = ABSENT
    """The assistant's reasoning, for chat templates that use it."""
    tool_calls: ChatToolCalls = ABSENT
    """The assistant's calls of tools."""
    # An answer that is sent back has all of these.
    function_call: only() = ABSENT  # type: ignore[valid-type]
    refusal: only() = ABSENT  # type: ignore[valid-type]
    audio: only() = ABSENT  # type: ignore[valid-type]
    annotations: IGNORED = ABSENT

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.content is None and not self.tool_calls:
            problem = "must be a string or a list of parts of type text"
            raise PydanticCustomError("invalid_type", "{problem}", {"problem": problem, "at": "content"})
        if self.tool_calls and self.role != "assistant":
            raise PydanticCustomError("invalid_value", "belong to messages of the assistant", {"at": "tool_calls"})
        return self


def _dialog(messages: list[ChatMessage]) -> tuple[Message, ...]:
    if not messages:
        raise PydanticCustomError("empty_messages", "must hold at least one message")
    return tuple(
        Message(
            _ROLES.get(message.role, message.role),
            message.content or "",
            tool_calls=message.tool_calls or (),  # type: ignore[arg-type]  # parsed
            tool_call_id=message.tool_call_id,
            name=message.name,
            reasoning_content=message.reasoning_content,
        )
        for message in messages
    )


def _tool_choice(value: object) -> ToolChoice:
    if isinstance(value, str):
        if value not in ("auto", "none", "required"):
            raise PydanticCustomError("invalid_value", 'must be "auto", "none", "required" or a function')
        return ToolChoice(value)  # type: ignore[arg-type]  # one of the three
    function = value.get("function") if isinstance(value, dict) and value.get("type") == "function" else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        problem = 'must be a word, or name a function as in {"type": "function", "function": {"name": "add"}}'
        raise PydanticCustomError("invalid_type", "{problem}", {"problem": problem})
    return ToolChoice("required", name)


_FUNCTION = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
_NAMED = {
    "type": "object",
    "properties": {"type": {"const": "function"}, "function": _FUNCTION},
    "required": ["type", "function"],
}
_CHOICE = {"anyOf": [{"enum": ["auto", "none", "required"]}, _NAMED]}
Messages = Annotated[
    list[ChatMessage],
    FailFast(),
    FewMessages,
    AfterValidator(_dialog),
    Field(json_schema_extra={"minItems": 1}, description="The chat to answer."),
]
"""The messages of a chat; parsed, a tuple of `Message`."""


class _Fields(SharedFields):  # type: ignore[valid-type,misc]  # it is a class
    hints: ClassVar[Mapping[str, str]] = {
        "prompt": 'send it as messages, as in {"messages": [{"role": "user", "content": "Hi"}]}',
        "dialog": "send it as messages",
        "n_predict": "did you mean max_tokens?",
        "max_new_tokens": "did you mean max_completion_tokens?",
        "min_new_tokens": "did you mean min_tokens?",
    }

    messages: Messages
    max_completion_tokens: MaxNewTokensOrNone = ABSENT
    logprobs: bool = False
    """Report each token's log probability."""
    top_logprobs: TopLogprobs = 0
    add_generation_prompt: bool = True
    """false is for continue_final_message only."""
    continue_final_message: bool = False
    """Continue the last message, which is the assistant's."""
    tools: ChatTools = ABSENT
    tool_choice: Annotated[Any, AfterValidator(_tool_choice), WithJsonSchema(_CHOICE)] = ABSENT
    """Whether tools are called, or which one: auto by default."""
    parallel_tool_calls: bool = True
    """Whether an answer may call several tools."""
    chat_template_kwargs: dict[str, Any] = ABSENT
    """Further variables of the chat template."""


_unsupported: dict[str, Any] = {name: (kind, ABSENT) for name, kind in CHAT.items()}
_Body = create_model("ChatCompletionRequest", __base__=_Fields, **_unsupported)


def _check_pairs(given: Given) -> None:
    """ApiError where two fields contradict each other."""
    newer, older = given.get("max_completion_tokens"), given.get("max_tokens")
    if newer is not None and older is not None and newer != older:
        message = f"max_tokens={older} contradicts max_completion_tokens={newer}; send one of them"
        raise ApiError(400, "conflicting_fields", message, "max_tokens")
    if given.get("top_logprobs") and not given.get("logprobs"):
        message = f"top_logprobs={given['top_logprobs']} needs logprobs=true, which is not given"
        raise ApiError(400, "conflicting_fields", message, "top_logprobs")
    check_continuation(given)


def check_continuation(given: Given) -> None:
    """ApiError unless the prompt ends either with the last message or with the beginning of an answer."""
    continues = given.get("continue_final_message", False)
    adds_prompt = given.get("add_generation_prompt", not continues)
    if continues and adds_prompt:
        message = "continue_final_message=true contradicts add_generation_prompt=true; leave one of them out"
        raise ApiError(400, "conflicting_fields", message, "add_generation_prompt")
