"""A service's reply to a client."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Reply:
    """Bytes for one client."""

    request_id: str
    body: bytes
    is_last: bool = True
    status: int = 200
    """HTTP status. Only a request's first reply sets it."""
    content_type: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)
    """Further HTTP headers. Only a request's first reply sets them."""
