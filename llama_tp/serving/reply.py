"""What a service has to say to a client."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Reply:
    """Bytes for one client."""

    request_id: str
    body: bytes
    is_last: bool = True
    status: int = 200
    """Of a request's first reply; later ones cannot change it."""
    content_type: str = "application/json"
