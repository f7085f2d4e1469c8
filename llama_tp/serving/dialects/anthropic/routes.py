"""The routes of Anthropic's API, below /predictions/<model>/<version>/."""

from __future__ import annotations

from llama_tp.serving.dialects.anthropic.errors import error_body
from llama_tp.serving.dialects.anthropic.replies import MessageReplies
from llama_tp.serving.dialects.anthropic.request import (
    CountTokensRequest,
    MessagesRequest,
    generation_request,
    prompt_request,
)
from llama_tp.serving.dialects.anthropic.types import AnthropicErrorBody, AnthropicMessage, MessageEvent, TokenCount
from llama_tp.serving.dialects.base import Accepted, Dialect, Prompts, Query
from llama_tp.serving.dialects.route import ModelRoute, Names
from llama_tp.serving.encoding import to_json
from llama_tp.serving.errors import ApiError
from llama_tp.serving.fields import MAX_NEW_TOKENS
from llama_tp.serving.generation import GenerationRequest, RequestDefaults
from llama_tp.serving.operation import Operation
from llama_tp.text.tokenizer import Tokenizer


def anthropic_dialects(defaults: RequestDefaults, names: Names) -> dict[str, Dialect]:
    """The dialects of the routes that generate."""
    return {"v1/messages": MessagesDialect(_route(defaults, names))}


def anthropic_queries(defaults: RequestDefaults, names: Names) -> dict[str, Query]:
    """The routes that answer without the engine."""
    return {"v1/messages/count_tokens": CountTokens(_route(defaults, names))}


def _route(defaults: RequestDefaults, names: Names) -> ModelRoute:
    return ModelRoute.of(defaults, names, max_tokens=MAX_NEW_TOKENS)  # requests always have their own


class MessagesDialect:
    """The Dialect of v1/messages."""

    def __init__(self, route: ModelRoute) -> None:
        self._route = route

    @property
    def operation(self) -> Operation:
        return Operation(
            id="create_message",
            summary="Answer a chat, as Anthropic's API does.",
            body=MessagesRequest,
            answer=AnthropicMessage,
            chunk=MessageEvent,
            chunk_type=MessageReplies.chunk_type,
            error=AnthropicErrorBody,
        )

    def parse(self, body: object) -> GenerationRequest:
        return generation_request(self._route, body)

    def replies(self, accepted: Accepted, tokenizer: Tokenizer, longest_token: int) -> MessageReplies:
        return MessageReplies(accepted, self._route.model_name, longest_token)

    def error(self, error: ApiError) -> bytes:
        return error_body(error)


class CountTokens:
    """The Query of v1/messages/count_tokens."""

    def __init__(self, route: ModelRoute) -> None:
        self._route = route

    @property
    def operation(self) -> Operation:
        return Operation(
            id="count_tokens",
            summary="Count the tokens of a chat's prompt, as Anthropic's API does.",
            body=CountTokensRequest,
            answer=TokenCount,
            error=AnthropicErrorBody,
        )

    def answer(self, body: object, prompts: Prompts) -> bytes:
        ids = prompts.prompt_ids(prompt_request(self._route, body))
        return to_json({"input_tokens": len(ids)}) + b"\n"

    def error(self, error: ApiError) -> bytes:
        return error_body(error)
