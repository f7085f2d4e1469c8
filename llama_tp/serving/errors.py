"""Why a request is refused, as clients read it."""

from __future__ import annotations

from llama_tp.serving.encoding import cut, to_json

MAX_MESSAGE = 1000
"""Characters of an error's message."""


class ApiError(Exception):
    """A request that is answered with `status` and `body()` instead of tokens.

    str() is status and code only: the message and param repeat text of the user's, which no log may hold.
    """

    def __init__(self, status: int, code: str, message: str, param: str | None = None) -> None:
        super().__init__(f"{status} {code}")
        self.status = status
        self.code = code
        self.message = cut(message, MAX_MESSAGE)
        self.param = param

    def fields(self) -> dict[str, str | None]:
        """What the error is, as a value for JSON."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"message": self.message, "type": kind, "param": self.param, "code": self.code}

    def body(self) -> bytes:
        """The error as OpenAI's clients read it: one line of JSON in UTF-8."""
        return to_json({"error": self.fields()})
