"""What a route's entry in the OpenAPI document is generated from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llama_tp.serving.errors import ErrorBody
from llama_tp.serving.strict_model import StrictModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One route: a GET if it takes no body, otherwise a POST."""

    id: str
    """Its operationId. A route that is another name of one before it has the same."""
    summary: str
    """One sentence."""
    body: type[StrictModel] | None = None
    """What its parser validates bodies with."""
    answer: Any
    """Type of a whole answer, a TypedDict."""
    answer_type: str = "application/json"
    """Content type of a whole answer."""
    chunk: Any = None
    """Type of a part of a stream; None: it cannot stream."""
    chunk_type: str = ""
    """Content type of a stream."""
    error: Any = ErrorBody
    """Type of an error, a TypedDict."""
