"""The types of the native dialect's replies, for the OpenAPI document."""

from __future__ import annotations

from typing import Literal

from typing_extensions import NotRequired, TypedDict

from llama_tp.serving.errors import Error


class NativeUsage(TypedDict):
    """Tokens that a request used."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Candidate(TypedDict):
    """A token and its log probability."""

    id: int
    token: str
    bytes: list[int]
    logprob: float


class Scored(Candidate):
    """A token of an answer, and the most probable tokens in its place."""

    top_logprobs: list[Candidate]


class ScoredPrompt(TypedDict):
    """A token of a prompt, whose first one has no log probability, and the most probable tokens in its place."""

    id: int
    token: str
    bytes: list[int]
    logprob: float | None
    top_logprobs: list[Candidate]


Reason = Literal["stop", "length", "timeout"]


class Answer(TypedDict):
    """A whole answer."""

    text: str
    logprobs: NotRequired[list[Scored]]
    finish_reason: Reason
    prompt_logprobs: NotRequired[list[ScoredPrompt]]
    usage: NativeUsage


class NativeChoice(TypedDict):
    """One of several answers."""

    index: int
    text: str
    logprobs: NotRequired[list[Scored]]
    finish_reason: Literal["stop", "length", "timeout", "error"]
    error: NotRequired[Error]


class AnswerOfSeveral(TypedDict):
    """The answers to a request with n > 1."""

    choices: list[NativeChoice]
    prompt_logprobs: NotRequired[list[ScoredPrompt]]
    usage: NativeUsage


class Line(TypedDict):
    """A line of a stream: the new text of one answer, which may be empty."""

    index: NotRequired[int]
    text: str
    ids: list[int]
    logprobs: NotRequired[list[Scored]]
    finish_reason: NotRequired[Literal["stop", "length", "timeout", "error"]]
    error: NotRequired[Error]
    usage: NotRequired[NativeUsage]
