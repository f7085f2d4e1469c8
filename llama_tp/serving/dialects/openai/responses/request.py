"""The fields of a request to v1/responses, and the GenerationRequest that they are.

{"input": "Hi", "max_output_tokens": 50, "stream": true}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BeforeValidator, FailFast, WithJsonSchema, create_model
from pydantic_core import PydanticCustomError

from llama_tp.engine.sampling_params import SamplingParams
from llama_tp.serving.dialects.formats import grammar_of
from llama_tp.serving.dialects.openai.request import Given, given_in
from llama_tp.serving.dialects.openai.responses.items import Input, turns_of
from llama_tp.serving.dialects.route import ModelRoute
from llama_tp.serving.dialects.tools import Few, FunctionDefinition, FunctionType, check_choice, unique_tools
from llama_tp.serving.dialects.unsupported import IGNORED, only
from llama_tp.serving.errors import ApiError
from llama_tp.serving.fields import ABSENT, KNOB_TYPES, MaxNewTokens, Seed, TopLogprobs
from llama_tp.serving.generation import FieldNames, GenerationRequest, ReplyOptions
from llama_tp.serving.strict_model import StrictModel
from llama_tp.text.dialog import Json
from llama_tp.text.grammar import Grammar
from llama_tp.text.tools.calls import ToolChoice

_PLAIN_TEXT = {"type": "text"}
_UNUSED = ("name", "description", "strict")
"""Fields of a format with a schema that change nothing: it is always followed."""
_LOGPROBS = "message.output_text.logprobs"
_INCLUDABLE = (
    _LOGPROBS,
    # of what there is never anything to include
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
)


@dataclass(frozen=True, slots=True)
class _Format:
    """The format of the answer's text."""

    grammar: Grammar | None
    given: Json


def _format(value: object) -> _Format:
    grammar = grammar_of(value, ["text", "json_schema", "json_object"], ignored=_UNUSED)
    assert isinstance(value, dict)
    return _Format(grammar, value)


_FORMATS = {
    "anyOf": [
        {
            "type": "object",
            "properties": {"type": {"enum": ["text", "json_object"]}},
            "required": ["type"],
            "additionalProperties": False,
        },
        {
            "type": "object",
            "properties": {
                "type": {"const": "json_schema"},
                "schema": {"type": "object"},
                **{name: {} for name in _UNUSED},
            },
            "required": ["type", "schema"],
            "additionalProperties": False,
        },
    ]
}


class ResponseText(StrictModel):
    """The form of the answer."""

    format: Annotated[Any, AfterValidator(_format), WithJsonSchema(_FORMATS)] = ABSENT
    """Text, or JSON under a schema."""
    verbosity: only("medium") = ABSENT  # type: ignore[valid-type]  # OpenAI's default


class ResponseTool(FunctionDefinition):
    """A function, without the object around it that chats have."""

    type: FunctionType
    allowed_callers: only(["direct"]) = ABSENT  # type: ignore[valid-type]
    defer_loading: only(False) = ABSENT  # type: ignore[valid-type]
    output_schema: IGNORED = ABSENT

    def echo(self) -> Json:
        """As the answer repeats it."""
        return {
            "type": "function",
            "name": self.name,
            "description": self.description,
            "parameters": self.parameters,
            "strict": self.strict,
        }


def _only_functions(tool: object) -> object:
    """Tools of other types have other fields, too: their type is refused before these are."""
    if isinstance(tool, dict) and tool.get("type", "function") != "function":
        raise PydanticCustomError(
            "unsupported_value", 'is not supported; the only type of tools is "function"', {"at": "type"}
        )
    return tool


@dataclass(frozen=True, slots=True)
class _Tools:
    """The functions in the form of chats, and as the answer repeats them."""

    tools: tuple[Json, ...] = ()
    echo: tuple[Json, ...] = ()


def _tools(tools: list[ResponseTool]) -> _Tools:
    return _Tools(unique_tools([tool.tool() for tool in tools]), tuple(tool.echo() for tool in tools))


def _choice(value: object) -> ToolChoice:
    if isinstance(value, str):
        if value not in ("auto", "none", "required"):
            raise PydanticCustomError("invalid_value", 'must be "auto", "none", "required" or an object')
        return ToolChoice(value)  # type: ignore[arg-type]  # it is one of the three
    if not isinstance(value, dict):
        raise PydanticCustomError("invalid_type", "must be a string or an object")
    if value.get("type") != "function":
        raise PydanticCustomError("unsupported_value", 'is not supported; the only type of tools is "function"')
    if not isinstance(value.get("name"), str) or len(value) > 2:
        raise PydanticCustomError("invalid_value", "must have a type and the function's name")
    return ToolChoice("required", value["name"])


_CHOICE = {
    "anyOf": [
        {"enum": ["auto", "none", "required"]},
        {
            "type": "object",
            "properties": {"type": {"const": "function"}, "name": {"type": "string"}},
            "required": ["type", "name"],
            "additionalProperties": False,
        },
    ]
}


def _includes(value: object) -> object:
    if not isinstance(value, list):
        raise PydanticCustomError("invalid_type", "must be a list of strings")
    for at, name in enumerate(value):
        if name not in _INCLUDABLE:
            raise PydanticCustomError("unsupported_value", "is not supported; leave it out", {"at": at})
    return value


def _no_reasoning(value: object) -> object:
    if not isinstance(value, dict):
        raise PydanticCustomError("invalid_type", "must be an object")
    if any(item is not None and (key, item) != ("effort", "none") for key, item in value.items()):
        raise PydanticCustomError("unsupported_value", "is not supported; leave it out")
    return value


def _metadata(value: object) -> object:
    if not isinstance(value, dict):
        raise PydanticCustomError("invalid_type", "must be an object of strings")
    for key, item in value.items():
        if not isinstance(item, str):
            raise PydanticCustomError("invalid_type", "must be a string", {"at": key})
    return value


_REASONING = {
    "type": "object",
    "properties": {"effort": {"enum": ["none", None]}},
    "additionalProperties": {"type": "null"},
}


class ResponseStreamOptions(StrictModel):
    """What a stream holds beside the answer."""

    include_obfuscation: IGNORED = False


class _Fields(StrictModel):
    hints: ClassVar[Mapping[str, str]] = {
        "messages": "send them as input",
        "prompt": "send the text as input",
        "max_tokens": "did you mean max_output_tokens?",
        "max_completion_tokens": "did you mean max_output_tokens?",
        "response_format": "send it as text.format",
    }

    model: str = ABSENT
    """The name of the model that is served; any other is a 404."""
    input: Input
    """Text to answer, or items of a chat."""
    instructions: str = ABSENT
    """The system prompt."""
    max_output_tokens: MaxNewTokens = ABSENT
    seed: Seed = ABSENT
    stream: bool = False
    """Server-sent events, instead of a single object."""
    stream_options: ResponseStreamOptions = ABSENT
    """Without effect."""
    text: ResponseText = ABSENT
    """The form of the answer's text."""
    tools: Annotated[
        list[Annotated[ResponseTool, BeforeValidator(_only_functions)]], FailFast(), Few, AfterValidator(_tools)
    ] = ABSENT
    """The functions that the assistant may call; their names differ."""
    tool_choice: Annotated[Any, AfterValidator(_choice), WithJsonSchema(_CHOICE)] = ABSENT
    """Whether tools are called, or which one: auto by default."""
    parallel_tool_calls: bool = True
    """Whether an answer may call several tools."""
    include: Annotated[
        Any, AfterValidator(_includes), WithJsonSchema({"type": "array", "items": {"enum": list(_INCLUDABLE)}})
    ] = ()
    """What the answer holds beside the text: log probabilities."""
    top_logprobs: TopLogprobs = 0
    metadata: Annotated[
        Any,
        AfterValidator(_metadata),
        WithJsonSchema({"type": "object", "additionalProperties": {"type": "string"}}),
    ] = ABSENT
    """Repeated in the answer."""
    reasoning: Annotated[Any, AfterValidator(_no_reasoning), WithJsonSchema(_REASONING)] = ABSENT
    """There is none: any effort is refused."""
    user: str = ABSENT
    """Repeated in the answer."""
    safety_identifier: str = ABSENT
    """Repeated in the answer."""
    prompt_cache_key: str = ABSENT
    """Repeated in the answer."""
    prompt_cache_retention: IGNORED = ABSENT
    prompt_cache_options: IGNORED = ABSENT
    service_tier: IGNORED = ABSENT
    max_tool_calls: int = ABSENT
    """Repeated in the answer. It is for tools that run on OpenAI's servers, of which there are none."""
    store: only(False) = ABSENT  # type: ignore[valid-type]
    background: only(False) = ABSENT  # type: ignore[valid-type]
    truncation: only("disabled") = ABSENT  # type: ignore[valid-type]
    previous_response_id: only() = ABSENT  # type: ignore[valid-type]
    conversation: only() = ABSENT  # type: ignore[valid-type]
    prompt: only() = ABSENT  # type: ignore[valid-type]
    moderation: only() = ABSENT  # type: ignore[valid-type]
    context_management: only([]) = ABSENT  # type: ignore[valid-type]


_knobs: dict[str, Any] = {name: (kind, ABSENT) for name, kind in KNOB_TYPES.items()}
Body = create_model("ResponseRequest", __base__=_Fields, **_knobs)
"""All fields of v1/responses."""


def response_request(route: ModelRoute, body: object) -> GenerationRequest:
    """The request in a body to v1/responses."""
    given = given_in(route.validate(Body, body))
    turns = turns_of(given.get("instructions"), given["input"])
    tools: _Tools = given.get("tools", _Tools())
    choice: ToolChoice = given.get("tool_choice", ToolChoice())
    choice = ToolChoice(choice.mode, choice.name, parallel=given.get("parallel_tool_calls", True))
    check_choice(choice, tools.tools, "tool_choice")
    sampling = route.sampling_params(
        given, max_new_tokens=given.get("max_output_tokens", route.max_tokens), logprobs=_logprobs(given)
    )
    text = given.get("text")
    form: _Format = text.format if text and text.format else _Format(None, _PLAIN_TEXT)
    return GenerationRequest(
        dialog=turns.messages,
        tools=tools.tools,
        tool_choice=choice,
        grammar=form.grammar,
        sampling=sampling,
        max_new_tokens_explicit="max_output_tokens" in given,
        stream=given.get("stream", False),
        reply=ReplyOptions(echoed=_echoed(given, sampling, choice, tools, form)),
        names=FieldNames(
            dialog="input",
            max_new_tokens="max_output_tokens",
            logprobs="top_logprobs",
            grammar="text.format",
            messages=turns.paths,
        ),
    )


def _logprobs(given: Given) -> int | None:
    """ApiError if their number is given, but not that they are wanted."""
    if _LOGPROBS in given.get("include", ()):
        return given.get("top_logprobs", 0)
    if given.get("top_logprobs"):
        message = f"top_logprobs={given['top_logprobs']} needs {_LOGPROBS} in include, which is not given"
        raise ApiError(400, "conflicting_fields", message, "top_logprobs")
    return None


def _echoed(given: Given, sampling: SamplingParams, choice: ToolChoice, tools: _Tools, form: _Format) -> dict[str, Any]:
    """The fields of the request that the answer repeats, with the defaults that were used."""
    return {
        "instructions": given.get("instructions"),
        "max_output_tokens": given.get("max_output_tokens"),
        "max_tool_calls": given.get("max_tool_calls"),
        "parallel_tool_calls": choice.parallel,
        "previous_response_id": None,
        "background": False,
        "reasoning": {"effort": None, "summary": None},
        "store": False,
        "temperature": sampling.temperature,
        "text": {"format": form.given, "verbosity": "medium"},
        "tool_choice": choice.mode if choice.name is None else {"type": "function", "name": choice.name},
        "tools": tools.echo,
        "top_logprobs": sampling.logprobs or 0,
        "top_p": sampling.top_p,
        "truncation": "disabled",
        "service_tier": "default",
        "user": given.get("user"),
        "safety_identifier": given.get("safety_identifier"),
        "prompt_cache_key": given.get("prompt_cache_key"),
        "metadata": given.get("metadata", {}),
    }
