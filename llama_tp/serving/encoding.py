"""Formats values as compact JSON, and for quoting in error messages."""

from __future__ import annotations

import json
import re
from typing import Any

MAX_ECHO = 64
"""Maximum characters of user text quoted in an error."""

MIN_LOGPROB = -9999.0
"""Replaces minus infinity, which JSON lacks, as in OpenAI's API."""

Path = tuple[str | int, ...]
"""Keys and indices that lead from the body to a value."""

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
_encode_in_pieces = json.JSONEncoder(ensure_ascii=False).iterencode


def to_json(value: Any) -> bytes:
    """One line of compact JSON, always valid UTF-8: a lone surrogate becomes a question mark."""
    return _encode(value).encode("utf-8", "replace")


def cut(text: str, limit: int) -> str:
    """The text, cut to `limit` characters; the last three are dots if anything is missing."""
    return text if len(text) <= limit else text[: limit - 3] + "..."


def shown(value: object) -> str:
    """A value as quoted in an error message: as JSON, printable, on one line, at most MAX_ECHO characters."""
    try:
        text = _beginning_of_json(value[: MAX_ECHO + 1] if isinstance(value, str) else value)
    except (TypeError, ValueError):  # YAML has values that JSON lacks, such as dates
        text = repr(value)
    return cut(_printable(text[: MAX_ECHO + 1]), MAX_ECHO)


def _printable(text: str) -> str:
    """The text on one line, its unprintable characters escaped."""
    return "".join(char if char.isprintable() else json.dumps(char)[1:-1] for char in text)


def _beginning_of_json(value: object) -> str:
    """The value's JSON, or more than MAX_ECHO characters of it: long lists are not encoded in full."""
    text = ""
    for piece in _encode_in_pieces(value):
        text += piece
        if len(text) > MAX_ECHO:
            break
    return text


def in_json_words(expected: str) -> str:
    """A Literal's choices in JSON's notation; pydantic lists them in Python's."""
    words = {"True": "true", "False": "false", "None": "null"}
    return re.sub("True|False|None|'([^']*)'", lambda match: words.get(match[0], f'"{match[1]}"'), expected)


def param_of(path: Path) -> str:
    """A path as users write it: dialog[1].role"""
    parts = (f"[{part}]" if isinstance(part, int) else f".{_printable(cut(part, MAX_ECHO))}" for part in path)
    return cut("".join(parts).removeprefix("."), MAX_ECHO)
