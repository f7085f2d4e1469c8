"""Values that are valid under a JSON schema, for property tests: of the keywords that our OpenAPI document uses."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from hypothesis import strategies as st

MAX_OPTIONAL = 6
"""Optional fields of one object: more seldom agree with each other."""

Schema = Mapping[str, Any]
Json = st.SearchStrategy[Any]

fractions = st.floats(allow_nan=False, allow_infinity=False).filter(lambda value: not value.is_integer())
anything: Json = st.recursive(
    st.none() | st.booleans() | st.integers() | fractions | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
"""Any JSON value. No integers with a fraction, such as 1.0: JSON Schema counts them as integers, we do not."""


def from_schema(schema: Schema, definitions: Mapping[str, Schema]) -> Json:
    """Values under `schema`, whose references are to `definitions`."""
    if "$ref" in schema:
        return from_schema(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    if choices := schema.get("anyOf") or schema.get("oneOf"):
        return st.one_of(*(from_schema(one, definitions) for one in choices))
    if "enum" in schema:
        return st.sampled_from(schema["enum"]).map(deepcopy)  # tests change what they draw
    if "const" in schema:
        return st.just(schema["const"]).map(deepcopy)
    if "type" not in schema:
        return anything
    kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    return st.one_of(*(_of_type(kind, schema, definitions) for kind in kinds))


def _of_type(kind: str, schema: Schema, definitions: Mapping[str, Schema]) -> Json:
    if kind == "object":
        return _objects(schema, definitions)
    if kind == "array":
        items = from_schema(schema["items"], definitions)
        return st.lists(items, min_size=schema.get("minItems", 0), max_size=min(schema.get("maxItems", 4), 4))
    if "contentSchema" in schema and kind == "string":
        return from_schema(schema["contentSchema"], definitions).map(json.dumps)
    if "pattern" in schema and kind == "string":
        return st.from_regex(re.compile(schema["pattern"], re.ASCII), fullmatch=True)
    if kind == "string":
        return st.text(min_size=schema.get("minLength", 0), max_size=min(schema.get("maxLength", 20), 20))
    if kind in ("integer", "number"):
        return _numbers(kind, schema)
    return {"boolean": st.booleans(), "null": st.none()}[kind]


def _numbers(kind: str, schema: Schema) -> Json:
    low, high = schema.get("minimum", schema.get("exclusiveMinimum")), schema.get("maximum")
    last = schema["exclusiveMaximum"] - 1 if "exclusiveMaximum" in schema else high
    if kind == "integer":
        return st.integers(low, last)
    floats = st.floats(low, high, exclude_min="exclusiveMinimum" in schema, allow_nan=False, allow_infinity=False)
    integers = st.integers(math.floor(low) + 1 if low is not None else None, last)
    return integers | floats.filter(lambda value: not value.is_integer())


def _objects(schema: Schema, definitions: Mapping[str, Schema]) -> Json:
    if "propertyNames" in schema:
        assert schema["propertyNames"] == {"pattern": "^(0|[1-9][0-9]{0,18})$"}, "the only one that we know"
        keys = st.integers(0, 10**19 - 1).map(str) | st.integers(0, 99).map(str)
        return st.dictionaries(keys, from_schema(schema["additionalProperties"], definitions), max_size=4)
    properties = schema.get("properties", {})
    others = schema.get("additionalProperties", True)
    more = from_schema({} if others is True else others, definitions) if others else st.nothing()
    names = st.text(max_size=4).filter(lambda name: name not in properties)
    extra = st.dictionaries(names, more, max_size=2) if others else st.just({})
    required = [name for name in properties if name in schema.get("required", ())]
    optional = [name for name in properties if name not in required]

    @st.composite
    def draw_one(draw: Any) -> dict[str, Any]:
        chosen = draw(st.sets(st.sampled_from(optional), max_size=MAX_OPTIONAL)) if optional else ()
        return {**draw(extra), **{name: draw(values(name)) for name in (*required, *sorted(chosen))}}

    made: dict[str, Json] = {}

    def values(name: str) -> Json:
        if name not in made:
            made[name] = from_schema(properties[name], definitions)
        return made[name]

    return draw_one()
