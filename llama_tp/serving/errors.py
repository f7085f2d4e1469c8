"""Errors as clients see them."""

from __future__ import annotations

from typing_extensions import TypedDict

from llama_tp.serving.encoding import cut, to_json

MAX_MESSAGE = 1000
"""Maximum characters of an error message."""


class Error(TypedDict):
    """What is wrong, and with what."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(TypedDict):
    """The body of an error."""

    error: Error


class ApiError(Exception):
    """Answers a request with `status` and `body()` instead of tokens.

    str() is status and code only: message and param quote user text, which must not be logged.
    """

    def __init__(self, status: int, code: str, message: str, param: str | None = None) -> None:
        super().__init__(f"{status} {code}")
        self.status = status
        self.code = code
        self.message = cut(message, MAX_MESSAGE)
        self.param = param

    def fields(self) -> dict[str, str | None]:
        """The error object, ready for JSON."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"message": self.message, "type": kind, "param": self.param, "code": self.code}

    def body(self) -> bytes:
        """The error in the form OpenAI's clients expect: one line of JSON in UTF-8."""
        return to_json({"error": self.fields()})
