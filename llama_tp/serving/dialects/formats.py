"""The format of an answer, as Anthropic's API and OpenAI's responses describe it.

{"type": "json_schema", "schema": {...}}
"""

from __future__ import annotations

from collections.abc import Collection

from pydantic_core import PydanticCustomError

from llama_tp.text.grammar import Grammar

_PLAIN: dict[str, Grammar | None] = {"text": None, "json_object": Grammar.json_object()}


def grammar_of(value: object, types: Collection[str], ignored: Collection[str] = ()) -> Grammar | None:
    """The grammar of a format of one of these types, None for text. `ignored`: further fields that it may have.

    PydanticCustomError names the field at fault.
    """
    if not isinstance(value, dict):
        raise PydanticCustomError("invalid_type", "must be an object")
    kind = value.get("type")
    if not isinstance(kind, str) or kind not in types:
        choices = " or ".join(f'"{one}"' for one in types)
        code = "invalid_value" if isinstance(kind, str) else "invalid_type"
        raise PydanticCustomError(code, "must have the type {choices}", {"choices": choices})
    known = {"type", "schema", *ignored} if kind == "json_schema" else {"type"}
    if (unknown := next((key for key in value if key not in known), None)) is not None:
        raise PydanticCustomError("unknown_field", "is not a known field", {"at": unknown})
    if kind != "json_schema":
        return _PLAIN[kind]
    schema = value.get("schema")
    if not isinstance(schema, dict):
        raise PydanticCustomError("invalid_type", 'must have a schema such as {"type": "object"}')
    return Grammar.json_schema(schema)
