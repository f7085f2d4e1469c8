"""JSON schemas such as people send, for tests of structured output."""

from __future__ import annotations

from typing import Any

SHORT = {"type": "string", "maxLength": 12}


def _closed(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


SCHEMAS: dict[str, Any] = {
    "boolean": {"type": "boolean"},
    "integer in a range": {"type": "integer", "minimum": -5, "maximum": 120},
    "number": {"type": "number", "minimum": 0, "exclusiveMaximum": 10},
    "multiple": {"type": "integer", "minimum": 0, "maximum": 100, "multipleOf": 5},
    "short string": SHORT,
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3,5}$"},
    "date": {"type": "string", "format": "date"},
    "e-mail": {"type": "string", "format": "email", "maxLength": 24},
    "uuid": {"type": "string", "format": "uuid"},
    "enum": {"enum": ["red", "green", "blue", 7, None, 'a "quoted" one']},
    "const": {"const": {"kind": "fixed", "version": 2}},
    "list of integers": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "maxItems": 4},
    "pair": {"type": "array", "prefixItems": [SHORT, {"type": "boolean"}], "items": False, "minItems": 2},
    "person": _closed(name=SHORT, age={"type": "integer", "minimum": 0, "maximum": 130}),
    "optional field": {
        "type": "object",
        "properties": {"a": {"type": "boolean"}, "b": {"type": "null"}},
        "required": ["a"],
        "additionalProperties": False,
    },
    "nested": _closed(user=_closed(id={"type": "integer", "minimum": 1, "maximum": 99}, tags={"enum": ["x", "y"]})),
    "any of": {"anyOf": [{"type": "boolean"}, _closed(error=SHORT)]},
    "nullable": _closed(value={"type": ["integer", "null"], "minimum": 0, "maximum": 9}),
    "definitions": {
        "$defs": {"color": {"enum": ["red", "green"]}},
        **_closed(first={"$ref": "#/$defs/color"}, second={"$ref": "#/$defs/color"}),
    },
    "recursive": {
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "value": {"type": "integer", "minimum": 0, "maximum": 9},
                    "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]},
                },
                "required": ["value", "next"],
                "additionalProperties": False,
            }
        },
        "$ref": "#/$defs/node",
    },
    "all of": {"allOf": [_closed(a={"type": "boolean"}, b=SHORT)]},
    "map": {
        "type": "object",
        "patternProperties": {"^[a-z]{1,3}$": {"type": "boolean"}},
        "additionalProperties": False,
        "maxProperties": 2,
    },
    "unicode": {"enum": ["größe", "大", "😀"]},
    "items of one kind": {"type": "array", "items": _closed(ok={"type": "boolean"}), "minItems": 1, "maxItems": 2},
}
