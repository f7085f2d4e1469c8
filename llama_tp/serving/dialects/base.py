"""The interface between the service and a dialect."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from llama_tp.serving.errors import ApiError
from llama_tp.serving.generation import GenerationRequest, OutputDelta, Usage
from llama_tp.serving.operation import Operation
from llama_tp.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Accepted:
    """An admitted request."""

    id: str
    """TorchServe's, which clients get as X-Request-Id."""
    request: GenerationRequest
    prompts: Sequence[Sequence[int]]
    """Token ids of each of its prompts; of one, if it has a dialog."""


class Replies(Protocol):
    """Formats the replies to one request."""

    chunk_tokens: int
    """Maximum tokens of each output per chunk."""
    chunk_type: str
    """Content type of a stream."""

    def chunk(self, deltas: Sequence[OutputDelta], usage: Usage | None) -> bytes:
        """The next chunk of a stream. The last one has `usage`. ApiError ends the request."""
        ...

    def answer(self, outputs: Sequence[OutputDelta], usage: Usage) -> bytes:
        """The whole answer to a non-streaming request. ApiError if it is too large."""
        ...

    def error(self, error: ApiError) -> bytes:
        """The last reply to a failed request, possibly in mid-stream."""
        ...


class Dialect(Protocol):
    """One API."""

    @property
    def operation(self) -> Operation:
        """Its route, for the OpenAPI document."""
        ...

    def parse(self, body: object) -> GenerationRequest:
        """The request in a body: bytes, text, or parsed JSON. ApiError with status 400 if it is invalid."""
        ...

    def replies(self, accepted: Accepted, tokenizer: Tokenizer, longest_token: int) -> Replies:
        """The formatter of its replies. `longest_token`: bytes of the longest token. ApiError if a reply would be too
        large."""
        ...

    def error(self, error: ApiError) -> bytes:
        """The answer to a refused request."""
        ...


class Prompts(Protocol):
    """Reads prompts as they are read for generating."""

    tokenizer: Tokenizer

    @property
    def max_seq_len(self) -> int: ...

    def prompt_ids(self, request: GenerationRequest) -> list[int]:
        """Ids of a request's prompt, however long. ApiError if it certainly exceeds the context, or if the model cannot
        read it."""
        ...


class Query(Protocol):
    """A route whose answer needs only the prompt, not the engine."""

    @property
    def operation(self) -> Operation:
        """Its route, for the OpenAPI document."""
        ...

    def answer(self, body: object, prompts: Prompts) -> bytes:
        """ApiError with status 400 if the body is invalid."""
        ...

    def error(self, error: ApiError) -> bytes:
        """The answer to a refused request."""
        ...
