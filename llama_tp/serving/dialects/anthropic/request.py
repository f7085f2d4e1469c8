"""The fields of a request to v1/messages, and the GenerationRequest that they are.

{"max_tokens": 50, "messages": [{"role": "user", "content": "Hi"}], "stream": true}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, FailFast, Field, WithJsonSchema, create_model
from pydantic_core import PydanticCustomError

from llama_tp.engine.sampling_params import SamplingParams
from llama_tp.serving.dialects.anthropic.content import InputMessage, Texts, turns_of
from llama_tp.serving.dialects.formats import grammar_of
from llama_tp.serving.dialects.route import ModelRoute
from llama_tp.serving.dialects.tools import (
    Few,
    ObjectSchema,
    ToolName,
    check_choice,
    function_tool,
    unique_tools,
)
from llama_tp.serving.dialects.turns import Turns
from llama_tp.serving.dialects.unsupported import IGNORED, only
from llama_tp.serving.errors import ApiError
from llama_tp.serving.fields import (
    ABSENT,
    KNOB_TYPES,
    MAX_STOPS,
    STOP,
    FewMessages,
    MaxNewTokens,
    Seed,
    StopStrings,
    must_be_text,
)
from llama_tp.serving.generation import FieldNames, GenerationRequest
from llama_tp.serving.strict_model import StrictModel
from llama_tp.text.dialog import Json
from llama_tp.text.grammar import Grammar
from llama_tp.text.tools.calls import ToolChoice


def _client_tool(tool: object) -> object:
    """Tools of other types run on Anthropic's servers, or are known to its models only."""
    if isinstance(tool, dict) and tool.get("type", "custom") not in ("custom", None):
        problem = "is not supported; describe the tool with name, description and input_schema instead"
        raise PydanticCustomError("unsupported_value", problem, {"at": "type"})
    return tool


class Tool(StrictModel):
    """A tool that the assistant may call."""

    name: ToolName
    description: str = ABSENT
    """What it does, for the model."""
    input_schema: ObjectSchema
    type: Annotated[str, WithJsonSchema({"const": "custom"})] = ABSENT
    """Tools of other types are refused."""
    strict: bool = ABSENT
    """Ignored: `tool_choice` decides whether arguments are constrained."""
    cache_control: IGNORED = ABSENT
    input_examples: IGNORED = ABSENT
    eager_input_streaming: IGNORED = ABSENT
    allowed_callers: only(["direct"]) = ABSENT  # type: ignore[valid-type]
    defer_loading: only(False) = ABSENT  # type: ignore[valid-type]


def _tools(tools: list[Tool]) -> tuple[Json, ...]:
    return unique_tools([function_tool(tool.name, tool.description, tool.input_schema) for tool in tools])


class AnthropicToolChoice(StrictModel):
    """Whether tools are called, or which one."""

    type: Annotated[Literal["auto", "any", "tool", "none"], BeforeValidator(must_be_text)]
    """tool: the one with the name."""
    name: ToolName = ABSENT
    disable_parallel_tool_use: bool = False
    """Whether an answer calls one tool at most."""


_MODES: dict[str, Literal["auto", "none", "required"]] = {
    "auto": "auto",
    "any": "required",
    "tool": "required",
    "none": "none",
}


def _choice(choice: AnthropicToolChoice) -> ToolChoice:
    if (choice.type == "tool") != (choice.name is not None):
        raise PydanticCustomError("invalid_value", "must have a name with the type tool, and with no other")
    return ToolChoice(_MODES[choice.type], choice.name, parallel=not choice.disable_parallel_tool_use)


def _format(value: object) -> Grammar:
    grammar = grammar_of(value, ["json_schema"])
    assert grammar is not None
    return grammar


_FORMAT = {
    "type": "object",
    "properties": {"type": {"const": "json_schema"}, "schema": {"type": "object"}},
    "required": ["type", "schema"],
    "additionalProperties": False,
}
_Format = Annotated[Any, AfterValidator(_format), WithJsonSchema(_FORMAT)]


class OutputConfig(StrictModel):
    """The form of the answer."""

    format: _Format = ABSENT
    """A JSON schema that the answer's text must match."""
    effort: only("high") = ABSENT  # type: ignore[valid-type]  # Anthropic's default


def _no_thinking(thinking: object) -> object:
    """The model decides whether it thinks with the type adaptive, so none is a valid answer to it."""
    if not isinstance(thinking, dict):
        raise PydanticCustomError("invalid_type", "must be an object")
    if thinking.get("type") not in ("disabled", "adaptive"):
        raise PydanticCustomError("unsupported_value", 'is not supported; leave it out or send {"type": "disabled"}')
    return thinking


def _a_list(stops: object) -> object:
    if not isinstance(stops, list):
        raise PydanticCustomError("invalid_type", "must be a list of strings")
    return stops


def _some_messages(messages: list[InputMessage]) -> list[InputMessage]:
    if not messages:
        raise PydanticCustomError("empty_messages", "must hold at least one message")
    return messages


_THINKING = {
    "type": "object",
    "properties": {"type": {"enum": ["disabled", "adaptive"]}},
    "required": ["type"],
}
_KEEPS_ALL = {"type": "clear_thinking_20251015", "keep": "all"}
_EDITS = {"type": "object", "properties": {"edits": {"type": "array", "items": {"const": _KEEPS_ALL}}}}
_STOPS = {"type": "array", "items": STOP, "maxItems": MAX_STOPS}


def _no_edits(management: object) -> object:
    """Coding agents ask for their thinking to be kept, which it is."""
    if not isinstance(management, dict):
        raise PydanticCustomError("invalid_type", "must be an object")
    edits = management.get("edits", [])
    if not isinstance(edits, list) or any(edit != _KEEPS_ALL for edit in edits):
        raise PydanticCustomError("unsupported_value", "is not supported; leave it out")
    return management


class CountTokensRequest(StrictModel):
    """The fields that make the prompt, and those that change nothing: all fields of v1/messages/count_tokens."""

    hints: ClassVar[Mapping[str, str]] = {
        "prompt": 'send it as messages, as in {"messages": [{"role": "user", "content": "Hi"}]}',
        "stop": "did you mean stop_sequences?",
        "max_completion_tokens": "did you mean max_tokens?",
        "response_format": "send the schema as output_config.format",
    }

    model: str = ABSENT
    """The name of the model that is served; any other is a 404."""
    messages: Annotated[
        list[InputMessage],
        FailFast(),
        FewMessages,
        AfterValidator(_some_messages),
        Field(json_schema_extra={"minItems": 1}),
    ]
    """The chat to answer. If the last message is the assistant's, the answer continues it."""
    system: Texts = ABSENT
    """The system prompt."""
    tools: Annotated[list[Annotated[Tool, BeforeValidator(_client_tool)]], FailFast(), Few, AfterValidator(_tools)] = (
        ABSENT
    )
    """The tools that the assistant may call; their names differ."""
    tool_choice: Annotated[AnthropicToolChoice, AfterValidator(_choice)] = ABSENT
    """Whether tools are called, or which one: auto by default."""
    output_config: OutputConfig = ABSENT
    """The form of the answer's text."""
    output_format: _Format = ABSENT
    """An older name of output_config.format."""
    thinking: Annotated[Any, AfterValidator(_no_thinking), WithJsonSchema(_THINKING)] = ABSENT
    """There is none: budgets are refused."""
    context_management: Annotated[Any, AfterValidator(_no_edits), WithJsonSchema(_EDITS)] = ABSENT
    """The context is never edited; only keeping all thinking is accepted."""
    cache_control: IGNORED = ABSENT
    speed: only("standard") = ABSENT  # type: ignore[valid-type]
    mcp_servers: only([]) = ABSENT  # type: ignore[valid-type]
    user_profile_id: IGNORED = ABSENT
    workspace_id: IGNORED = ABSENT


class _GenerationFields(CountTokensRequest):
    max_tokens: MaxNewTokens
    stop_sequences: Annotated[StopStrings, BeforeValidator(_a_list), WithJsonSchema(_STOPS)] = ABSENT
    seed: Seed = ABSENT
    stream: bool = False
    """Server-sent events, instead of a single object."""
    metadata: IGNORED = ABSENT
    service_tier: IGNORED = ABSENT
    inference_geo: IGNORED = ABSENT
    container: only() = ABSENT  # type: ignore[valid-type]
    diagnostics: only() = ABSENT  # type: ignore[valid-type]


_knobs: dict[str, Any] = {name: (kind, ABSENT) for name, kind in KNOB_TYPES.items()}
MessagesRequest = create_model("MessagesRequest", __base__=_GenerationFields, **_knobs)
"""All fields of v1/messages."""


def generation_request(route: ModelRoute, body: object) -> GenerationRequest:
    """The request in a body to v1/messages."""
    given = _given_in(route.validate(MessagesRequest, body))
    return _request(
        given,
        sampling=route.sampling_params(given, max_new_tokens=given["max_tokens"], logprobs=None),
        max_new_tokens_explicit=True,
        stop=tuple(given.get("stop_sequences", ())),
        stream=given.get("stream", False),
    )


def prompt_request(route: ModelRoute, body: object) -> GenerationRequest:
    """The request in a body to v1/messages/count_tokens, which has no fields of generation."""
    return _request(_given_in(route.validate(CountTokensRequest, body)), sampling=SamplingParams())


def _given_in(fields: StrictModel) -> dict[str, Any]:
    return {name: getattr(fields, name) for name in fields.model_fields_set}


def _request(given: Mapping[str, Any], **others: Any) -> GenerationRequest:
    turns = turns_of(given.get("system"), given["messages"])
    tools, choice = given.get("tools", ()), given.get("tool_choice", ToolChoice())
    check_choice(choice, tools, "tool_choice")
    return GenerationRequest(
        dialog=turns.messages,
        continue_final_message=_is_begun(turns),
        tools=tools,
        tool_choice=choice,
        grammar=_grammar(given),
        names=FieldNames(
            dialog="messages", max_new_tokens="max_tokens", grammar="output_config.format", messages=turns.paths
        ),
        **others,
    )


def _is_begun(turns: Turns) -> bool:
    """Whether the last message is the beginning of the answer. ApiError if it calls tools, which need results first."""
    last = turns.messages[-1] if turns.messages else None
    if last is None or last.role != "assistant":
        return False
    if last.tool_calls:
        problem = f"{turns.paths[-1]} ends with a tool_use; send its result as a block of type tool_result"
        raise ApiError(400, "invalid_role_order", problem, turns.paths[-1])
    return True


def _grammar(given: Mapping[str, Any]) -> Grammar | None:
    config = given.get("output_config")
    newer: Grammar | None = config.format if config else None
    older: Grammar | None = given.get("output_format")
    if newer is not None and older is not None and newer != older:
        problem = "output_format contradicts output_config.format; send one of them"
        raise ApiError(400, "conflicting_fields", problem, "output_format")
    return newer or older
