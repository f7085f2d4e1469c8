"""Parses bodies as JSON objects, strictly: what JSON itself leaves undefined is an `ApiError`.

That is excessive depth, duplicate keys, numbers outside float64 and lone surrogates. A UTF-8 byte order mark is
ignored, as RFC 8259 section 8.1 allows: Windows editors write one.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from itertools import accumulate
from typing import Any, NoReturn

from llama_tp.serving.encoding import Path, param_of, shown
from llama_tp.serving.errors import ApiError

MAX_DEPTH = 32
"""Levels of objects and lists in a body; the body itself is the first."""
MAX_VALUES = 1 << 18
"""Values in a body: twice the token ids of the longest context, and few enough not to delay other streams."""


def parse_json(body: object) -> dict[str, Any]:
    """The JSON object in a body of bytes or text. An already parsed body gets the checks that are still possible.

    The result has no lone surrogate, no number outside float64, and nothing deeper than MAX_DEPTH.
    """
    if isinstance(body, (str, bytes, bytearray, memoryview)):
        body = _loads(body)
    if not isinstance(body, Mapping):
        raise ApiError(
            400, "not_an_object", f'the body is {shown(body)}; it must be an object such as {{"prompt": "Hi"}}'
        )
    parsed = dict(body)
    _check_values(parsed, ())
    return parsed


def _loads(body: str | bytes | bytearray | memoryview) -> Any:
    """A strict json.loads. Depth is checked before parsing, so that no input can exhaust the stack."""
    text, raw = _decode(body)
    if not text.strip():
        raise ApiError(400, "invalid_json", 'the body is empty; send a JSON object such as {"prompt": "Hi"}')
    outside = _outside_strings(raw)
    if _depth(outside) > MAX_DEPTH:
        raise _too_deep()
    if (commas := outside.count(b",")) >= MAX_VALUES:
        raise ApiError(400, "too_many_values", f"the body holds over {commas} values; send at most {MAX_VALUES}")
    try:
        return json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        message = f"the body is not JSON: {error.msg} (line {error.lineno}, column {error.colno})"
        raise ApiError(400, "invalid_json", message) from None
    except ValueError:  # CPython refuses to convert integers of more than 4300 digits
        raise ApiError(
            400, "invalid_value", "an integer has thousands of digits; no field takes such a number"
        ) from None


def _decode(body: str | bytes | bytearray | memoryview) -> tuple[str, bytes]:
    """The body as text, without byte order mark, and as UTF-8."""
    try:
        raw = body.encode() if isinstance(body, str) else bytes(body)
        text = raw.decode()
    except UnicodeEncodeError:
        raise ApiError(400, "invalid_unicode", "the body holds a lone surrogate; send whole characters") from None
    except UnicodeDecodeError as error:
        message = f"the body is not UTF-8 (byte {error.start}); send uncompressed JSON in UTF-8"
        raise ApiError(400, "invalid_utf8", message) from None
    return text.removeprefix("\ufeff"), raw


_BRACKETS = b"[]{}"
_STEPS = bytes.maketrans(_BRACKETS, b"\x01\xff\x01\xff")
_NOT_BRACKETS = bytes(set(range(256)) - set(_BRACKETS))


def _outside_strings(raw: bytes) -> bytes:
    """The body without its strings, in linear time. In invalid JSON, correct up to the first error."""
    unescaped = raw.replace(rb"\\", b"").replace(rb"\"", b"")
    return b"".join(unescaped.split(b'"')[::2])


def _depth(outside: bytes) -> int:
    """The deepest nesting."""
    steps = outside.translate(_STEPS, delete=_NOT_BRACKETS)
    return max(accumulate(memoryview(steps).cast("b")), default=0)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ApiError(400, "duplicate_key", f"the key {shown(twice)} occurs twice in one object", param_of((twice,)))
    return unique


def _refuse_constant(name: str) -> NoReturn:
    raise ApiError(400, "invalid_json", f"the body is not JSON: there is no {name} in JSON")


def _too_deep() -> ApiError:
    return ApiError(400, "too_deep", f"the body is nested deeper than {MAX_DEPTH} levels")


def _check_values(value: object, path: Path) -> None:
    """ApiError for what valid JSON may contain, but no request may."""
    if isinstance(value, str):
        _check_text(value, path)
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise _out_of_float64(path)
    elif isinstance(value, int):
        if value.bit_length() > 1023:
            raise _out_of_float64(path)
    elif isinstance(value, (dict, list)):
        if len(path) >= MAX_DEPTH:
            raise _too_deep()
        if isinstance(value, dict):
            for key in value:
                _check_key(key, path)
        for part, item in value.items() if isinstance(value, dict) else enumerate(value):
            _check_values(item, (*path, part))


def _check_key(key: object, path: Path) -> None:
    if not isinstance(key, str):
        raise ApiError(400, "invalid_type", f"the key {shown(key)} must be a string", param_of(path) or None)
    _check_text(key, (*path, key))


def _check_text(text: str, path: Path) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        surrogate = f"\\u{ord(text[error.start]):04x}"
        message = f"{param_of(path)} holds a lone surrogate, {surrogate}; send whole characters"
        raise ApiError(400, "invalid_unicode", message, param_of(path)) from None


def _out_of_float64(path: Path) -> ApiError:
    return ApiError(400, "invalid_value", f"{param_of(path)} must be a finite number within float64", param_of(path))
