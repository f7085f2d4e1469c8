"""A tool, a call of it, and what a chat template makes of them or has to say instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": 'The <b>weather</b> & the "wind", in Zürich or 東京 😀\x7f',
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer", "default": 1, "maximum": 1.5}},
            "required": ["city"],
        },
    },
}
CALL = {"type": "function", "id": "abcdefghi", "function": {"name": "get_weather", "arguments": {"city": "<Zürich>"}}}


def outcome(render: Callable[[], Any]) -> Any:
    """The result, or the error's text without the error's name."""
    try:
        return render()
    except Exception as error:  # the oracle raises jinja's own
        return str(error).rpartition("Error: ")[2]
