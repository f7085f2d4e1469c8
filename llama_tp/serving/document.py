"""The answer of a route that is the same for every request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from llama_tp.serving.operation import Operation
from llama_tp.serving.reply import Reply


@dataclass(frozen=True, slots=True)
class Document:
    """Bytes that a route always answers with."""

    body: bytes
    operation: Operation
    """Its route, for the OpenAPI document."""
    content_type: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)
    """Further HTTP headers."""

    def reply(self, request_id: str) -> Reply:
        return Reply(request_id, self.body, content_type=self.content_type, headers=self.headers)
