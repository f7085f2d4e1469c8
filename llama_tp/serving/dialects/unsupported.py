"""Fields of an API that are not implemented.

A value that would change the answer is refused with the code unsupported_value; any other is accepted and ignored.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from llama_tp.serving.encoding import to_json

IGNORED = Annotated[Any, Field(description="Accepted and ignored.")]
"""A field without effect on the answer, whatever its value."""


def only(*harmless: object) -> Any:
    """A field that is refused unless its value is one of these, which ask for nothing."""
    instead = "".join(f" or send {to_json(value).decode()}" for value in harmless[:1])

    def check(value: object) -> object:
        if not any(type(value) is type(one) and value == one for one in harmless):
            context = {"instead": instead}
            raise PydanticCustomError("unsupported_value", "is not supported; leave it out{instead}", context)
        return value

    return Annotated[
        Any,
        AfterValidator(check),
        Field(description="Not supported: only values that ask for nothing are accepted."),
        WithJsonSchema({"enum": list(harmless)}),
    ]
