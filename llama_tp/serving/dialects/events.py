"""Server-sent events with names (WHATWG HTML, section 9.2)."""

from __future__ import annotations

from typing import Any

from llama_tp.serving.encoding import to_json


def event(name: str, fields: dict[str, Any]) -> bytes:
    """An event whose data repeat its name as their type."""
    return b"event: " + name.encode() + b"\ndata: " + to_json({"type": name, **fields}) + b"\n\n"
