"""The dialect of v1/completions.

{"prompt": "The capital of France is", "max_tokens": 50, "stream": true}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, WithJsonSchema, create_model
from pydantic_core import PydanticCustomError

from llama_tp.serving.dialects.base import Accepted
from llama_tp.serving.dialects.openai.replies import CompletionReplies
from llama_tp.serving.dialects.openai.request import Route, SharedFields, given_in
from llama_tp.serving.dialects.openai.types import Completion, CompletionChunk
from llama_tp.serving.dialects.openai.unsupported import COMPLETIONS
from llama_tp.serving.dialects.route import Names
from llama_tp.serving.errors import ApiError, ErrorBody
from llama_tp.serving.fields import ABSENT, TEXT_OR_IDS, TopLogprobs, token_ids
from llama_tp.serving.generation import FieldNames, GenerationRequest, Prompt, RequestDefaults
from llama_tp.serving.operation import Operation
from llama_tp.text.tokenizer import Tokenizer

MAX_TOKENS = 16
"""OpenAI's default, and vLLM's."""
MAX_PROMPTS = 1024
_NAMES = FieldNames(max_new_tokens="max_tokens", min_new_tokens="min_tokens", top_logprobs="logprobs")
_ECHO_NAMES = replace(_NAMES, prompt_logprobs="logprobs")


class CompletionsDialect:
    """The Dialect of v1/completions."""

    def __init__(self, defaults: RequestDefaults, names: Names) -> None:
        self._route = Route.of(defaults, names, max_tokens=MAX_TOKENS)

    @property
    def operation(self) -> Operation:
        return Operation(
            id="create_completion",
            summary="Continue a text, as OpenAI's API does.",
            body=_Body,
            answer=Completion,
            chunk=CompletionChunk | ErrorBody,
            chunk_type=CompletionReplies.chunk_type,
        )

    def parse(self, body: object) -> GenerationRequest:
        given = given_in(self._route.validate(_Body, body))
        names = _NAMES if "prompt_logprobs" in given else _ECHO_NAMES
        return self._route.request(
            given,
            names,
            logprobs=given.get("logprobs"),
            echo=given.get("echo", False),
            prompts=given["prompt"],
            special_tokens=given.get("add_special_tokens", True),
        )

    def replies(self, accepted: Accepted, tokenizer: Tokenizer, longest_token: int) -> CompletionReplies:
        return CompletionReplies(accepted, self._route.model_name, tokenizer, longest_token)

    def error(self, error: ApiError) -> bytes:
        return error.body()


def _prompts(value: object) -> tuple[Prompt, ...]:
    """A text, token ids, or a list of these."""
    if not isinstance(value, (str, list)):
        raise PydanticCustomError("invalid_type", "must be a string, a list of token ids, or a list of these")
    if not value:
        raise PydanticCustomError("empty_prompt", "must not be empty")
    if isinstance(value, str):
        return (value,)
    if not isinstance(value[0], (str, list)):
        return (token_ids(value),)
    if len(value) > MAX_PROMPTS:
        raise PydanticCustomError("invalid_value", f"must have at most {MAX_PROMPTS} prompts")
    return tuple(_one_of(prompt, at) for at, prompt in enumerate(value))


def _one_of(prompt: object, at: int) -> Prompt:
    """One of several prompts."""
    if not isinstance(prompt, (str, list)):
        raise PydanticCustomError("invalid_type", "must be a string or a list of token ids", {"at": at})
    if not prompt:
        raise PydanticCustomError("empty_prompt", "must not be empty", {"at": at})
    try:
        return prompt if isinstance(prompt, str) else token_ids(prompt)
    except PydanticCustomError as error:
        raise PydanticCustomError(error.type, error.message_template, {"at": at}) from None


_SEVERAL = {"type": "array", "items": TEXT_OR_IDS, "minItems": 1, "maxItems": MAX_PROMPTS}
_PROMPTS = {"anyOf": [*TEXT_OR_IDS["anyOf"], _SEVERAL]}


class _Fields(SharedFields):  # type: ignore[valid-type,misc]  # it is a class
    hints: ClassVar[Mapping[str, str]] = {
        "messages": "it is a field of v1/chat/completions; here, send the text as prompt",
        "n_predict": "did you mean max_tokens?",
        "max_new_tokens": "did you mean max_tokens?",
        "max_completion_tokens": "did you mean max_tokens?",
        "min_new_tokens": "did you mean min_tokens?",
    }

    prompt: Annotated[Any, AfterValidator(_prompts), WithJsonSchema(_PROMPTS)]
    """Text to continue, or its token ids; or a list of these, each of which is continued."""
    add_special_tokens: bool = True
    """Whether a text begins with BOS, if the model's prompts do."""
    echo: bool = False
    """Begin the answer with the prompt's text."""
    logprobs: TopLogprobs = ABSENT


_unsupported: dict[str, Any] = {name: (kind, ABSENT) for name, kind in COMPLETIONS.items()}
_Body = create_model("CompletionRequest", __base__=_Fields, **_unsupported)
