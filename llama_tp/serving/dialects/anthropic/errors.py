"""Errors in Anthropic's form."""

from __future__ import annotations

from typing import Any

from llama_tp.serving.encoding import to_json
from llama_tp.serving.errors import ApiError

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def error_fields(error: ApiError) -> dict[str, Any]:
    """The object, ready for JSON. Anthropic has neither param nor code; the message names the field."""
    kind = _TYPES.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}}


def error_body(error: ApiError) -> bytes:
    return to_json(error_fields(error)) + b"\n"
