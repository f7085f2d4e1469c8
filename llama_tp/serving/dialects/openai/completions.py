"""The dialect of v1/completions.

{"prompt": "The capital of France is", "max_tokens": 50, "stream": true}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, WithJsonSchema, create_model
from pydantic_core import PydanticCustomError

from llama_tp.serving.dialects.base import Accepted
from llama_tp.serving.dialects.openai.replies import CompletionReplies
from llama_tp.serving.dialects.openai.request import Given, Route, SharedFields, given_in
from llama_tp.serving.dialects.openai.types import Completion, CompletionChunk
from llama_tp.serving.dialects.openai.unsupported import COMPLETIONS
from llama_tp.serving.errors import ApiError
from llama_tp.serving.fields import ABSENT, TEXT_OR_IDS, TopLogprobs, token_ids
from llama_tp.serving.generation import FieldNames, GenerationRequest, RequestDefaults
from llama_tp.serving.operation import Operation
from llama_tp.text.tokenizer import Tokenizer

MAX_TOKENS = 16
"""OpenAI's default, and vLLM's."""
_NAMES = FieldNames(max_new_tokens="max_tokens", min_new_tokens="min_tokens", top_logprobs="logprobs")


class CompletionsDialect:
    """The Dialect of v1/completions."""

    def __init__(self, defaults: RequestDefaults, model_name: str) -> None:
        self._route = Route.of(defaults, model_name, max_tokens=MAX_TOKENS)

    @property
    def operation(self) -> Operation:
        return Operation(
            id="create_completion",
            summary="Continue a text, as OpenAI's API does.",
            body=_Body,
            answer=Completion,
            chunk=CompletionChunk,
            chunk_type=CompletionReplies.chunk_type,
        )

    def parse(self, body: object) -> GenerationRequest:
        given = given_in(self._route.validate(_Body, body))
        _check_pairs(given)
        return self._route.request(
            given, _NAMES, logprobs=given.get("logprobs"), echo=given.get("echo", False), prompt=given["prompt"]
        )

    def replies(self, accepted: Accepted, tokenizer: Tokenizer, longest_token: int) -> CompletionReplies:
        return CompletionReplies(accepted, self._route.model_name, tokenizer, longest_token)

    def error(self, error: ApiError) -> bytes:
        return error.body()


def _one_prompt(value: object) -> str | tuple[int, ...]:
    """A text, token ids, or a list of one of these."""
    if not isinstance(value, (str, list)):
        raise PydanticCustomError("invalid_type", "must be a string or a list of token ids")
    if not value:
        raise PydanticCustomError("empty_prompt", "must not be empty")
    if isinstance(value, str):
        return value
    if not isinstance(value[0], (str, list)):
        return token_ids(value)
    if len(value) > 1:
        raise PydanticCustomError("unsupported_value", "must be one prompt; send the others in their own requests")
    try:
        return _one_prompt(value[0]) if isinstance(value[0], str) or not value[0] else token_ids(value[0])
    except PydanticCustomError as error:
        raise PydanticCustomError(error.type, error.message_template, {"at": 0}) from None


_PROMPTS = [*TEXT_OR_IDS["anyOf"], {"type": "array", "items": TEXT_OR_IDS, "minItems": 1, "maxItems": 1}]


class _Fields(SharedFields):  # type: ignore[valid-type,misc]  # it is a class
    hints: ClassVar[Mapping[str, str]] = {
        "messages": "it is a field of v1/chat/completions; here, send the text as prompt",
        "max_new_tokens": "did you mean max_tokens?",
        "max_completion_tokens": "did you mean max_tokens?",
        "min_new_tokens": "did you mean min_tokens?",
    }

    prompt: Annotated[Any, AfterValidator(_one_prompt), WithJsonSchema({"anyOf": _PROMPTS})]
    """Text to continue, or its token ids; also a list of one of these."""
    echo: bool = False
    """Begin the answer with the prompt's text."""
    logprobs: TopLogprobs = ABSENT


_unsupported: dict[str, Any] = {name: (kind, ABSENT) for name, kind in COMPLETIONS.items()}
_Body = create_model("CompletionRequest", __base__=_Fields, **_unsupported)


def _check_pairs(given: Given) -> None:
    """ApiError where two fields contradict each other."""
    if given.get("echo") and "logprobs" in given:
        message = f"echo=true with logprobs={given['logprobs']} is not supported; leave one of them out"
        raise ApiError(400, "unsupported_value", message, "echo")
