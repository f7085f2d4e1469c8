"""Validates JSON objects: known fields of exactly the declared types, and a single error for the first problem."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler, ValidationError, model_validator
from pydantic_core import CoreSchema, ErrorDetails, PydanticCustomError

from llama_tp.serving.encoding import MAX_ECHO, Path, in_json_words, param_of, shown
from llama_tp.serving.errors import ApiError


class StrictModel(BaseModel):
    """An object with known fields of exactly the declared JSON types: no conversion, no extras.

    null counts as omitted for an optional field: some clients send every field they know.
    """

    model_config = ConfigDict(strict=True, frozen=True, use_attribute_docstrings=True)

    hints: ClassVar[Mapping[str, str]] = {}
    """What to do instead, for field names of other APIs."""

    @model_validator(mode="before")
    @classmethod
    def _check_fields(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        # Not pydantic's extra="forbid": it creates an error for each of a million keys, and suggests nothing.
        for key in value:
            if key not in cls.model_fields:
                hint = cls.hints.get(key) or _nearest(key, cls.model_fields)
                raise PydanticCustomError("unknown_field", "is not a known field; {hint}", {"at": key, "hint": hint})
        return {key: item for key, item in value.items() if item is not None or cls.model_fields[key].is_required()}

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """What the JSON schema of a model cannot tell by its fields: see the class."""
        reference = handler(core_schema)
        schema = handler.resolve_ref_schema(reference)
        del schema["title"]
        schema["additionalProperties"] = False
        properties, required = schema.get("properties", {}), schema.get("required", ())
        for name, field in properties.items():
            field.pop("title", None)
            if name not in required:
                properties[name] = _or_null(field)
        return reference


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    """The JSON schema of an optional field; a default of null is left out."""
    annotations = {key: schema[key] for key in ("description", "default") if schema.get(key) is not None}
    kind = {key: value for key, value in schema.items() if key not in ("description", "default")}
    if not kind:
        return annotations
    if "const" in kind or "enum" in kind:
        return {**annotations, "enum": [*kind.get("enum", (kind.get("const"),)), None]}
    if "type" in kind:
        types = kind["type"] if isinstance(kind["type"], list) else [kind["type"]]
        return {**annotations, **kind, "type": [*types, "null"]}
    choices = kind["anyOf"] if kind.keys() == {"anyOf"} else [kind]
    return {**annotations, "anyOf": [*choices, {"type": "null"}]}


def _nearest(key: str, fields: Collection[str]) -> str:
    close = difflib.get_close_matches(key[:MAX_ECHO], fields, n=1)
    return f"did you mean {close[0]}?" if close else f"the fields are {', '.join(fields)}"


Model = TypeVar("Model", bound=StrictModel)


def validate(model: type[Model], payload: Mapping[str, Any]) -> Model:
    """The payload as `model`. ApiError for the first problem.

    A list of models or numbers should have FailFast(): one error is enough.
    """
    try:
        return model.model_validate(payload)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    raise _api_error(first, payload)


# pydantic's error types in our models -> our code, and the constraint in the message. A PydanticCustomError is not
# listed: its type is the code, its message the constraint, and "at" in its context may be the key or index at fault.
_RULES = {
    "missing": ("missing_field", "is missing"),
    "model_type": ("invalid_type", "must be an object"),
    "dict_type": ("invalid_type", "must be an object"),
    "list_type": ("invalid_type", "must be a list"),
    "string_type": ("invalid_type", "must be a string"),
    "bool_type": ("invalid_type", "must be true or false"),
    "int_type": ("invalid_type", "must be an integer"),
    "float_type": ("invalid_type", "must be a number"),
    "literal_error": ("invalid_value", "must be {expected}"),
    "greater_than": ("invalid_value", "must be greater than {gt}"),
    "greater_than_equal": ("invalid_value", "must be at least {ge}"),
    "less_than": ("invalid_value", "must be less than {lt}"),
    "less_than_equal": ("invalid_value", "must be at most {le}"),
    "string_too_short": ("invalid_value", "must have at least {min_length} characters"),
    "string_too_long": ("invalid_value", "must have at most {max_length} characters"),
    "too_short": ("invalid_value", "must have at least {min_length} entries"),
    "too_long": ("invalid_value", "must have at most {max_length} entries"),
}


def _api_error(error: ErrorDetails, payload: object) -> ApiError:
    kind, value, context = error["type"], error["input"], error.get("ctx", {})
    path = _path_in(payload, error["loc"], is_missing=kind == "missing")
    if "at" in context:
        at = context["at"]
        path, value = (*path, at), value.get(at) if isinstance(value, dict) else value[at]
    code, constraint = _RULES.get(kind, (kind, error["msg"]))
    if kind == "missing":  # only the request itself lacks a field; an inner object without one is malformed
        code = code if len(path) == 1 else "invalid_type"
        given = param_of(path)
    else:
        given = f"{param_of(path)}={shown(value)}"
    if kind == "literal_error":
        context = {"expected": in_json_words(context["expected"])}
    constraint = constraint.format(**context) if kind in _RULES else constraint
    return ApiError(400, code, f"{given} {constraint}", param_of(path))


def _path_in(payload: object, location: tuple[int | str, ...], *, is_missing: bool) -> Path:
    """A pydantic location without the parts that are not in the payload: union tags, the index of a lone string. A
    field that is missing is the last part."""
    path: list[str | int] = []
    for at, part in enumerate(location):
        if isinstance(payload, dict) and isinstance(part, str):
            if part not in payload and not (is_missing and at == len(location) - 1):
                continue
            payload = payload.get(part)
        elif isinstance(payload, list) and isinstance(part, int):
            payload = payload[part]
        else:
            continue
        path.append(part)
    return tuple(path)
