"""The types of replies in OpenAI's dialect, for the OpenAPI document."""

from __future__ import annotations

from typing import Literal

from typing_extensions import NotRequired, TypedDict

Reason = Literal["stop", "length"]
ChatReason = Literal["stop", "length", "tool_calls"]


class PromptTokensDetails(TypedDict):
    """Of the prompt's tokens, those that were found in the prefix cache."""

    cached_tokens: int


class CompletionUsage(TypedDict):
    """Tokens that a request used."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TopLogprob(TypedDict):
    """A token and its log probability."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token of an answer, and the most probable tokens in its place."""

    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(TypedDict):
    """Log probabilities of a chat's answer."""

    content: list[TokenLogprob]
    refusal: None


class PromptLogprob(TypedDict):
    """A token of a prompt, or one in its place."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]
"""By token id, for each token of a prompt but the first."""


class AnswerFunction(TypedDict):
    """A function, and the JSON text of its arguments."""

    name: str
    arguments: str


class AnswerToolCall(TypedDict):
    """A call of a function."""

    id: str
    type: Literal["function"]
    function: AnswerFunction


class AssistantMessage(TypedDict):
    """An answer to a chat."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: NotRequired[list[AnswerToolCall]]


class ChatChoice(TypedDict):
    """One of a chat's answers."""

    index: int
    message: AssistantMessage
    logprobs: ChoiceLogprobs | None
    finish_reason: ChatReason
    token_ids: NotRequired[list[int]]


class ChatCompletion(TypedDict):
    """The answers to a chat."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: CompletionUsage
    prompt_token_ids: NotRequired[list[int]]
    prompt_logprobs: NotRequired[PromptLogprobs]


class FunctionDelta(TypedDict):
    """The name of a function, or new JSON text of its arguments, or both."""

    name: NotRequired[str]
    arguments: str


class ToolCallPart(TypedDict):
    """New content of a call."""

    index: int
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: FunctionDelta


class ChoiceDelta(TypedDict):
    """New content of an answer."""

    role: NotRequired[Literal["assistant"]]
    content: str
    tool_calls: NotRequired[list[ToolCallPart]]


class ChatChunkChoice(TypedDict):
    """New content of one of a chat's answers."""

    index: int
    delta: ChoiceDelta
    logprobs: ChoiceLogprobs | None
    finish_reason: ChatReason | None
    token_ids: NotRequired[list[int]]


class UsageSoFar(TypedDict):
    """Tokens that a request has used so far."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatCompletionChunk(TypedDict):
    """An event of a chat's stream, whose last one is [DONE]."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: NotRequired[CompletionUsage | UsageSoFar | None]
    prompt_token_ids: NotRequired[list[int]]


class LogprobLists(TypedDict):
    """Log probabilities of a completion: parallel lists."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(TypedDict):
    """One of a prompt's completions, or new content of it."""

    index: int
    text: str
    logprobs: LogprobLists | None
    finish_reason: Reason | None
    token_ids: NotRequired[list[int]]
    prompt_token_ids: NotRequired[list[int]]
    prompt_logprobs: NotRequired[PromptLogprobs]


class Completion(TypedDict):
    """The completions of a prompt."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: CompletionUsage


class CompletionChunk(TypedDict):
    """An event of a completion's stream, whose last one is [DONE]."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: NotRequired[CompletionUsage | UsageSoFar | None]


class Tokenized(TypedDict):
    """The tokens of a prompt."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(TypedDict):
    """The text of token ids."""

    prompt: str


class Model(TypedDict):
    """The model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(TypedDict):
    """The models that are served: one."""

    object: Literal["list"]
    data: list[Model]
