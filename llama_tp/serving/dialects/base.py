"""What the service asks of a dialect."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from llama_tp.serving.errors import ApiError
from llama_tp.serving.generation import GenerationRequest, OutputDelta, Usage
from llama_tp.text.tokenizer import Tokenizer


class Replies(Protocol):
    """How one request is answered."""

    chunk_tokens: int
    """Most tokens of each output in a chunk."""
    chunk_type: str
    """Content type of a stream."""

    def chunk(self, deltas: Sequence[OutputDelta], usage: Usage | None) -> bytes:
        """The next piece of a stream. usage ends it."""
        ...

    def answer(self, outputs: Sequence[OutputDelta], usage: Usage) -> bytes:
        """The whole answer to a request that does not stream. ApiError if it is too large."""
        ...

    def error(self, error: ApiError) -> bytes:
        """What ends a request that has failed, possibly after a part of its stream."""
        ...


class Dialect(Protocol):
    """One API."""

    def parse(self, body: object) -> GenerationRequest:
        """The request in a body: bytes, text, or parsed JSON. ApiError with status 400 if it is none."""
        ...

    def replies(self, request: GenerationRequest, tokenizer: Tokenizer, longest_token: int) -> Replies:
        """How to answer it. `longest_token`: most bytes of a token."""
        ...

    def error(self, error: ApiError) -> bytes:
        """The answer to a request that is refused."""
        ...
