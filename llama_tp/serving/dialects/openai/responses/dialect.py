"""The dialect of v1/responses."""

from __future__ import annotations

from llama_tp.serving.dialects.base import Accepted
from llama_tp.serving.dialects.openai.responses.replies import ResponseReplies
from llama_tp.serving.dialects.openai.responses.request import Body, response_request
from llama_tp.serving.dialects.openai.responses.types import Response, ResponseEvent
from llama_tp.serving.dialects.route import ModelRoute, Names
from llama_tp.serving.errors import ApiError
from llama_tp.serving.fields import MAX_NEW_TOKENS
from llama_tp.serving.generation import GenerationRequest, RequestDefaults
from llama_tp.serving.operation import Operation
from llama_tp.text.tokenizer import Tokenizer


class ResponsesDialect:
    """The Dialect of v1/responses."""

    def __init__(self, defaults: RequestDefaults, names: Names) -> None:
        self._route = ModelRoute.of(defaults, names, max_tokens=MAX_NEW_TOKENS)  # clipped to what fits

    @property
    def operation(self) -> Operation:
        return Operation(
            id="create_response",
            summary="Answer a chat, as OpenAI's Responses API does.",
            body=Body,
            answer=Response,
            chunk=ResponseEvent,
            chunk_type=ResponseReplies.chunk_type,
        )

    def parse(self, body: object) -> GenerationRequest:
        return response_request(self._route, body)

    def replies(self, accepted: Accepted, tokenizer: Tokenizer, longest_token: int) -> ResponseReplies:
        return ResponseReplies(accepted, self._route.model_name, tokenizer, longest_token)

    def error(self, error: ApiError) -> bytes:
        return error.body()
