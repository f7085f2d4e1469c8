"""The fields that prescribe the form of an answer: OpenAI's response_format, vLLM's structured_outputs, llama.cpp's.

{"response_format": {"type": "json_schema", "json_schema": {"name": "person", "schema": {"type": "object", ...}}}}
{"structured_outputs": {"choice": ["yes", "no"]}}
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from llama_tp.serving.errors import ApiError
from llama_tp.serving.strict_json import parse_json
from llama_tp.text.grammar import Grammar

MAX_CHOICES = 1000
_BOOLEANS = {"true": True, "false": False}


def _wrong(kind: str, problem: str, at: str | None = None) -> PydanticCustomError:
    return PydanticCustomError(kind, "{problem}", {"problem": problem, **({} if at is None else {"at": at})})


def _object(value: object, known: Collection[str]) -> Mapping[str, Any]:
    """The fields of an object that are not null."""
    if not isinstance(value, dict):
        raise _wrong("invalid_type", "must be an object")
    if (unknown := next((key for key in value if key not in known), None)) is not None:
        raise _wrong("unknown_field", f"is not a known field; the fields are {', '.join(known)}", unknown)
    return {key: item for key, item in value.items() if item is not None}


def _response_format(value: object) -> Grammar | None:
    fields = _object(value, ("type", "json_schema", "schema"))
    kind = fields.get("type")
    if kind not in ("text", "json_object", "json_schema"):
        code = "invalid_value" if isinstance(kind, str) else "invalid_type"
        raise _wrong(code, 'must have "text", "json_object" or "json_schema" as its type')
    if "schema" in fields:  # llama.cpp's place for it
        if kind == "text" or "json_schema" in fields:
            problem = 'belongs to the types "json_object" and "json_schema", without a json_schema beside it'
            raise _wrong("conflicting_fields", problem, "schema")
        return _at("schema", _schema_object, fields["schema"])
    if kind == "json_schema":
        return _named_schema(fields.get("json_schema"))
    if "json_schema" in fields:
        raise _wrong("conflicting_fields", 'belongs to the type "json_schema"', "json_schema")
    return None if kind == "text" else Grammar.json_object()


def _schema_object(value: object) -> Grammar:
    if not isinstance(value, (dict, bool)):
        raise PydanticCustomError("invalid_type", "must be a JSON schema")
    return Grammar.json_schema(value)


def _at(name: str, read: Callable[[object], Grammar | None], value: object) -> Grammar | None:
    """What `read` makes of the part of a field that has this name."""
    try:
        return read(value)
    except PydanticCustomError as error:
        raise _wrong(error.type, error.message(), name) from None


def _named_schema(value: object) -> Grammar:
    """name and description are for the reader; a schema is always followed, whatever `strict` says."""
    if not isinstance(value, dict):
        raise _wrong("invalid_type", 'must have a json_schema such as {"name": "person", "schema": {"type": "object"}}')
    try:
        fields = _object(value, ("name", "description", "schema", "strict"))
    except PydanticCustomError as error:
        unknown = str((error.context or {}).get("at"))[:64]
        name = "".join(char if char.isprintable() else "?" for char in unknown)
        raise _wrong("unknown_field", f"has an unknown field: {name}", "json_schema") from None
    schema = fields.get("schema", {"type": "object"})
    for name, kind, noun in (("name", str, "text"), ("description", str, "text"), ("strict", bool, "true or false")):
        if not isinstance(fields.get(name, kind()), kind):
            raise _wrong("invalid_type", f"must have {noun} as its {name}", "json_schema")
    if not isinstance(schema, (dict, bool)):
        raise _wrong("invalid_type", "must have a JSON schema as its schema", "json_schema")
    return Grammar.json_schema(schema)


def _schema(value: object) -> Grammar:
    """vLLM takes a schema's JSON text, too, to which the limits of bodies apply."""
    if isinstance(value, str):
        try:
            value = _BOOLEANS[value.strip()] if value.strip() in _BOOLEANS else parse_json(value)
        except ApiError:
            raise PydanticCustomError("invalid_value", "must be a JSON schema, or its text") from None
    if not isinstance(value, (dict, bool)):
        raise PydanticCustomError("invalid_type", "must be a JSON schema, or its text")
    return Grammar.json_schema(value)


def _text(make: Callable[[str], Grammar]) -> Callable[[object], Grammar]:
    def grammar(value: object) -> Grammar:
        if not isinstance(value, str):
            raise PydanticCustomError("invalid_type", "must be a string")
        if not value:
            raise PydanticCustomError("invalid_value", "must not be empty")
        return make(value)

    return grammar


def _choice(value: object) -> Grammar:
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise PydanticCustomError("invalid_type", "must be a list of strings")
    if not 0 < len(value) <= MAX_CHOICES or not all(value):
        raise PydanticCustomError("invalid_value", f"must hold 1 to {MAX_CHOICES} strings, none of them empty")
    return Grammar.choice(value)


def _any_object(value: object) -> Grammar | None:
    if not isinstance(value, bool):
        raise PydanticCustomError("invalid_type", "must be true or false")
    return Grammar.json_object() if value else None


_KINDS: dict[str, Callable[[object], Grammar | None]] = {
    "json": _schema,
    "regex": _text(Grammar.regex),
    "choice": _choice,
    "grammar": _text(Grammar.of_notation),
    "json_object": _any_object,
}
_SETTINGS = ("disable_fallback", "backend")
"""Which library vLLM uses, and what it does if that fails: without effect on a valid answer."""
_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "structural_tag": (),
    "whitespace_pattern": (),
    "disable_any_whitespace": (False,),
    "disable_additional_properties": (False,),
}
"""vLLM's other fields, and the values besides null that ask for nothing."""


def _structured_outputs(value: object) -> Grammar | None:
    fields = _object(value, (*_KINDS, *_SETTINGS, *_UNSUPPORTED))
    grammars = []
    for name, item in fields.items():
        if name in _SETTINGS:
            continue
        if name in _UNSUPPORTED:
            _ask_for_nothing(name, item)
            continue
        grammars.append(_at(name, _KINDS[name], item))
    given = [grammar for grammar in grammars if grammar is not None]
    if len(given) > 1:
        raise _wrong("conflicting_fields", f"must have only one of {', '.join(_KINDS)}")
    return given[0] if given else None


def _ask_for_nothing(name: str, item: object) -> None:
    if not any(item is harmless for harmless in _UNSUPPORTED[name]):
        raise _wrong("unsupported_value", "is not supported; leave it out", name)


def _closed(properties: Mapping[str, Any], *required: str) -> dict[str, Any]:
    """The JSON schema of an object with these fields only."""
    return {
        "type": "object",
        "properties": dict(properties),
        "required": list(required),
        "additionalProperties": False,
    }


def _or_null(kind: Mapping[str, Any]) -> dict[str, Any]:
    return {"anyOf": [kind, {"type": "null"}]}


_NAMED_SCHEMA = _closed(
    {
        "name": {"type": ["string", "null"]},
        "description": {"type": ["string", "null"]},
        "schema": {"type": ["object", "boolean", "null"]},
        "strict": {"type": ["boolean", "null"]},
    }
)
_SCHEMA = {"type": ["object", "boolean"]}
_NULL = {"type": "null"}
_FORMATS = {
    "anyOf": [
        _closed({"type": {"enum": ["text", "json_object"]}, "json_schema": _NULL, "schema": _NULL}, "type"),
        _closed(
            {"type": {"const": "json_schema"}, "json_schema": _NAMED_SCHEMA, "schema": _NULL}, "type", "json_schema"
        ),
        _closed(
            {"type": {"enum": ["json_object", "json_schema"]}, "json_schema": _NULL, "schema": _SCHEMA},
            *("type", "schema"),
        ),
    ]
}
_SCHEMA_OR_TEXT = {
    "anyOf": [_SCHEMA, {"type": "string", "contentMediaType": "application/json", "contentSchema": _SCHEMA}]
}
_SOME_TEXT = {"type": "string", "minLength": 1}
_CHOICES = {"type": "array", "items": _SOME_TEXT, "minItems": 1, "maxItems": MAX_CHOICES}
_CONSTRAINTS = _closed(
    {
        "json": {"anyOf": [*_SCHEMA_OR_TEXT["anyOf"], {"type": "null"}]},
        "regex": _or_null(_SOME_TEXT),
        "choice": _or_null(_CHOICES),
        "grammar": _or_null(_SOME_TEXT),
        "json_object": {"type": ["boolean", "null"]},
        **{name: {} for name in _SETTINGS},
        **{name: {"enum": [*harmless, None]} for name, harmless in _UNSUPPORTED.items()},
    }
)


def _field(validator: Callable[[object], Grammar | None], schema: dict[str, Any], meaning: str) -> Any:
    return Annotated[Any, AfterValidator(validator), Field(description=meaning), WithJsonSchema(schema)]


FIELDS: dict[str, Any] = {
    "response_format": _field(_response_format, _FORMATS, "The form of the answer: text, or JSON under a schema."),
    "structured_outputs": _field(_structured_outputs, _CONSTRAINTS, "What the answer must match: one of these."),
    # vLLM's older names
    "guided_json": _field(_schema, _SCHEMA_OR_TEXT, "A JSON schema, or its text, that the answer must match."),
    "guided_regex": _field(_text(Grammar.regex), _SOME_TEXT, "A regular expression that matches the whole answer."),
    "guided_choice": _field(_choice, _CHOICES, "The texts of which the answer is one."),
    "guided_grammar": _field(_text(Grammar.of_notation), _SOME_TEXT, "The answer's grammar, in Lark or GBNF."),
    # llama.cpp's names
    "json_schema": _field(_schema, _SCHEMA_OR_TEXT, "A JSON schema, or its text, that the answer must match."),
    "grammar": _field(_text(Grammar.of_notation), _SOME_TEXT, "The answer's grammar, in Lark or GBNF."),
}
"""Name and type of the fields; parsed, each is a `Grammar` or None."""


def grammar_in(given: Mapping[str, Any], *, min_tokens: str) -> tuple[Grammar | None, str]:
    """The grammar that the fields of a request prescribe, and the field's name.

    min_tokens: what the dialect calls it. ApiError if two fields contradict each other.
    """
    grammars = {name: given[name] for name in FIELDS if given.get(name) is not None}
    if not grammars:
        return None, "response_format"
    name, *others = grammars
    if others:
        message = f"{others[0]} and {name} both prescribe the answer's form; send one of them"
        raise ApiError(400, "conflicting_fields", message, others[0])
    for other in (min_tokens, "ignore_eos"):
        if given.get(other):
            message = f"{other} and {name} contradict each other: the form decides where the answer ends"
            raise ApiError(400, "conflicting_fields", message, other)
    return grammars[name], name
