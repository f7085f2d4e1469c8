"""The OpenAPI document: valid as such, and true of what the parsers accept and of what the replies hold."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import jsonschema_rs
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llama_tp.engine.request import FinishReason, Logprobs
from llama_tp.serving.dialects.base import Accepted
from llama_tp.serving.dialects.openai.routes import model_documents
from llama_tp.serving.errors import ApiError
from llama_tp.serving.generation import GenerationRequest, OutputDelta, Usage
from llama_tp.serving.strict_json import parse_json
from tests.mutation import HOSTILE, mutated, places
from tests.optional import imported
from tests.paths import ROOT
from tests.unit.documented_routes import (
    ACROSS_FIELDS,
    BODIES,
    DEFINITIONS,
    DIALECTS,
    DOCUMENT,
    ROUTES,
    body_schema,
    minimal,
    outcome,
)
from tests.unit.text_fixtures import tiny


def validator(schema: dict[str, Any]) -> Any:
    return jsonschema_rs.Draft202012Validator({**schema, "components": {"schemas": DEFINITIONS}})


VALIDATORS = {route: validator(body_schema(route)) for route in ROUTES}


def test_the_document_is_valid() -> None:
    imported("openapi_spec_validator").validate(DOCUMENT)


def test_every_field_of_every_body_is_described() -> None:
    for route in ROUTES:
        named = [body_schema(route)]
        for schema in named:
            assert schema["additionalProperties"] is False
            for name, field in schema["properties"].items():
                assert field.get("description"), f"{route}: {name}"
                references = [field, field.get("items", {}), *field.get("anyOf", [])]
                named += [DEFINITIONS[one["$ref"].rpartition("/")[2]] for one in references if "$ref" in one]


@pytest.mark.parametrize("route", ROUTES)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_a_body_is_accepted_if_it_is_valid_under_the_schema(route: str, data: st.DataObject) -> None:
    body = data.draw(BODIES[route])
    assert VALIDATORS[route].is_valid(body)
    result = outcome(route, json.dumps(body).encode())
    if isinstance(result, ApiError):
        assert (result.code, result.param) in ACROSS_FIELDS, result.message


@pytest.mark.parametrize("route", ROUTES)
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_a_body_is_accepted_only_if_it_is_valid_under_the_schema(route: str, data: st.DataObject) -> None:
    body = data.draw(mutated(BODIES[route]))
    try:
        parse_json(body)
    except ApiError:
        return  # not strict JSON, of which the schema says nothing
    if any(type(box[key]) is float and box[key].is_integer() for box, key in places(body)):
        return  # an integer for JSON Schema
    result = outcome(route, body)
    if not isinstance(result, ApiError):
        assert VALIDATORS[route].is_valid(body), body
    elif (result.code, result.param) not in ACROSS_FIELDS:
        assert not VALIDATORS[route].is_valid(body), result.message


def at_the_limits(schema: Any) -> list[Any]:
    """Values at each limit of a schema, and just beyond."""
    if not schema:
        return []
    found: list[Any] = [one for inner in schema.get("anyOf", ()) for one in at_the_limits(inner)]
    for keyword in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"):
        if keyword in schema:
            found += [schema[keyword] + step for step in (-1, -0.25, 0, 0.25, 1)]
    for keyword in ("minLength", "maxLength"):
        found += ["a" * max(0, schema[keyword] + step) for step in (-1, 0, 1) if keyword in schema]
    items = schema.get("items", {})
    item = 1 if items.get("type") == "integer" else "a"
    for keyword in ("minItems", "maxItems"):
        found += [[item] * max(0, schema[keyword] + step) for step in (-1, 0, 1) if keyword in schema]
    if "maxProperties" in schema:
        found += [{str(key): 1 for key in range(schema["maxProperties"] + step)} for step in (0, 1)]
    found += [[value] for value in at_the_limits(items)]
    found += [{"5": value} for value in at_the_limits(schema.get("additionalProperties") or {})]
    return [value for value in found if not (type(value) is float and value.is_integer())]


@pytest.mark.parametrize("route", ROUTES)
def test_schema_and_parser_agree_on_every_field(route: str) -> None:
    keys = [{key: 1} for key in ("5", "05", "5\n", "five", str(10**19))]
    words = ["auto", "none", "required", "text", "chat", ["text"], 1, 2, *keys]
    for name, field in body_schema(route)["properties"].items():
        for value in [*words, *HOSTILE, *at_the_limits(field)]:
            body = {**minimal(route), name: value}
            result = outcome(route, body)
            if isinstance(result, ApiError) and (
                (result.code, result.param) in ACROSS_FIELDS or result.code == "invalid_unicode"
            ):
                continue
            if (type(value) is float and (not math.isfinite(value) or value.is_integer())) or value == 10**400:
                continue  # of which JSON Schema has another opinion
            assert isinstance(result, GenerationRequest) == VALIDATORS[route].is_valid(body), (name, value)


def test_an_integer_with_a_fraction_is_one_for_json_schema_only() -> None:
    assert VALIDATORS[""].is_valid({"prompt": "a", "n": 1.0})
    assert outcome("", {"prompt": "a", "n": 1.0}).code == "invalid_type"


def test_the_rules_that_the_schema_cannot_express_are_documented() -> None:
    page = (ROOT / "docs/openapi.md").read_text()
    assert not [param for _, param in ACROSS_FIELDS if f"`{param}`" not in page]


# --- replies

TOKENIZER = tiny("sentencepiece")
USAGE = Usage(3, 5, 1)
ALTERNATIVES = Logprobs(-0.5, ((7, -0.5), (8, float("-inf"))))
FIELDS: dict[str, dict[str, Any]] = {
    "": {"logprobs": True, "top_logprobs": 2},
    "v1/chat/completions": {"logprobs": True, "top_logprobs": 2, "return_token_ids": True},
    "v1/completions": {"logprobs": 2, "return_token_ids": True},
}
"""Optional fields of bodies that make replies as large as they can be."""


def closed(schema: Any) -> Any:
    """The schema without tolerance for fields that it does not name."""
    if isinstance(schema, list):
        return [closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {key: closed(value) for key, value in schema.items()}
    return {"additionalProperties": False, **inner} if "properties" in schema else inner


def reply_validator(route: str, content_type: str) -> Any:
    content = DOCUMENT["paths"][f"/{route}"]["post"]["responses"]["200"]["content"]
    described = content[content_type]["schema"]
    if content_type == "text/event-stream":
        described = described["properties"]["data"]["anyOf"][1]["contentSchema"]
    schema = {**described, "components": {"schemas": DEFINITIONS}}
    return jsonschema_rs.Draft202012Validator(closed(copy.deepcopy(schema)))


def replies_to(route: str, body: dict[str, Any]) -> Any:
    request = DIALECTS[route].parse({**minimal(route), **body})
    return DIALECTS[route].replies(Accepted("id", request, [1, 2, 3]), TOKENIZER, 16)


def delta(index: int, finish_reason: FinishReason | None, *, scored: bool) -> OutputDelta:
    logprobs = [ALTERNATIVES] if scored else None
    return OutputDelta(index=index, text="a", ids=[7], logprobs=logprobs, finish_reason=finish_reason, error=None)


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("route", ROUTES)
def test_an_answer_has_the_declared_fields_and_no_other(route: str, full: bool, n: int) -> None:
    fields = FIELDS.get(route, {}) if full else {}
    reasons = (FinishReason.STOP, FinishReason.LENGTH)
    outputs = [delta(index, reasons[index], scored=bool(fields)) for index in range(n)]

    answer = replies_to(route, {**fields, "n": n}).answer(outputs, USAGE)

    reply_validator(route, "application/json").validate(json.loads(answer))


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("route", ROUTES)
def test_a_stream_consists_of_the_declared_items(route: str, full: bool) -> None:
    fields = FIELDS.get(route, {}) if full else {}
    if full and route:
        fields = {**fields, "stream_options": {"include_usage": True}}
    replies = replies_to(route, {**fields, "stream": True})

    stream = replies.chunk([delta(0, None, scored=full)], None)
    stream += replies.chunk([delta(0, FinishReason.LENGTH, scored=full)], USAGE)

    items = items_of(stream)
    assert len(items) >= 2
    checked = reply_validator(route, replies.chunk_type)
    for item in items:
        checked.validate(item)


def items_of(stream: bytes) -> list[Any]:
    lines = [line.removeprefix(b"data: ") for line in stream.splitlines() if line]
    return [json.loads(line) for line in lines if line != b"[DONE]"]


def test_the_descriptions_of_the_model_have_the_declared_fields_and_no_other() -> None:
    for route, body in model_documents("llama", 2048).items():
        content = DOCUMENT["paths"][f"/{route}"]["get"]["responses"]["200"]["content"]
        schema = {**content["application/json"]["schema"], "components": {"schemas": DEFINITIONS}}
        jsonschema_rs.Draft202012Validator(closed(copy.deepcopy(schema))).validate(json.loads(body))


def test_an_error_has_the_declared_fields_and_no_other() -> None:
    checked = validator(closed({"$ref": "#/components/schemas/ErrorBody"}))
    checked.validate(json.loads(ApiError(429, "queue_full", "wait", None).body()))
    assert DEFINITIONS["Error"]["required"] == ["message", "type", "param", "code"]
