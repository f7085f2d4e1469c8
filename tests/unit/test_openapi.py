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
from llama_tp.serving.errors import ApiError
from llama_tp.serving.generation import OutputDelta, Usage
from llama_tp.serving.strict_json import parse_json
from llama_tp.text.tools.calls import ToolCallDelta
from tests.mutation import HOSTILE, mutated, places
from tests.optional import imported
from tests.paths import ROOT
from tests.unit.documented_routes import (
    ACROSS_FIELDS,
    ALIASES,
    BODIES,
    DEFINITIONS,
    DIALECTS,
    DOCUMENT,
    QUERIES,
    ROUTES,
    SERVED,
    body_schema,
    is_across,
    minimal,
    outcome,
)
from tests.unit.text_fixtures import tiny


def validator(schema: dict[str, Any]) -> Any:
    return jsonschema_rs.Draft202012Validator({**schema, "components": {"schemas": DEFINITIONS}})


VALIDATORS = {route: validator(body_schema(route)) for route in ROUTES}


def test_the_document_is_valid() -> None:
    imported("openapi_spec_validator").validate(DOCUMENT)


def test_every_route_of_the_service_is_in_the_document_and_no_other() -> None:
    assert DOCUMENT["paths"].keys() == {f"/{route}" for route in SERVED}
    methods = {route: {"post"} if route in (*DIALECTS, *QUERIES) else {"get"} for route in SERVED}
    assert {route: DOCUMENT["paths"][f"/{route}"].keys() for route in SERVED} == methods
    assert {"", "v1/chat/completions", "v1/responses", "v1/messages", "v1/messages/count_tokens"} <= set(ROUTES)
    assert {"tokenize", "detokenize", "chat", "openapi.json", "v1/models", "v1/models/llama"} <= set(SERVED)


def test_a_route_with_two_names_is_described_twice_under_two_ids() -> None:
    assert ALIASES == {"v1/tokenize": "tokenize", "v1/detokenize": "detokenize"}
    for alias, route in ALIASES.items():
        described, other = (dict(DOCUMENT["paths"][f"/{name}"]["post"]) for name in (route, alias))
        assert described.pop("operationId") == route
        assert other.pop("operationId") == f"{route}_2"
        assert described == other


def references_in(schema: Any) -> set[str]:
    """Names of the definitions that a schema refers to."""
    if isinstance(schema, list):
        return {name for one in schema for name in references_in(one)}
    if not isinstance(schema, dict):
        return set()
    inner = {name for key, value in schema.items() if key != "$ref" for name in references_in(value)}
    return inner | ({schema["$ref"].rpartition("/")[2]} if "$ref" in schema else set())


def definitions_of(schema: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """All definitions that a schema needs."""
    found: dict[str, dict[str, Any]] = {}
    waiting = references_in(schema)
    while waiting:
        name = waiting.pop()
        found[name] = DEFINITIONS[name]
        waiting |= references_in(found[name]) - found.keys()
    return found


def test_every_field_of_every_body_is_described() -> None:
    for route in ROUTES:
        body = body_schema(route)
        for name, schema in {route: body, **definitions_of(body)}.items():
            assert schema["additionalProperties"] is False, name
            for field, described in schema["properties"].items():
                assert described.get("description"), f"{name}: {field}"


def test_every_field_of_every_body_has_a_schema_unless_it_is_ignored() -> None:
    for route in ROUTES:
        body = body_schema(route)
        for name, schema in {route: body, **definitions_of(body)}.items():
            for field, described in schema["properties"].items():
                constrained = described.keys() & {"type", "enum", "const", "anyOf", "$ref"}
                assert constrained or described["description"] == "Accepted and ignored.", f"{name}: {field}"


@pytest.mark.parametrize("route", ROUTES)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_a_body_is_accepted_if_it_is_valid_under_the_schema(route: str, data: st.DataObject) -> None:
    body = data.draw(BODIES[route])
    assert VALIDATORS[route].is_valid(body)
    result = outcome(route, json.dumps(body).encode())
    if isinstance(result, ApiError):
        assert is_across(result), (result.code, result.param, result.message)


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
    elif not is_across(result):
        assert not VALIDATORS[route].is_valid(body), result.message


def at_the_limits(schema: Any) -> list[Any]:
    """Values at each limit of a schema, and just beyond."""
    if not schema or schema is True:
        return []
    choices = (*schema.get("anyOf", ()), *schema.get("oneOf", ()))
    found: list[Any] = [one for inner in choices for one in at_the_limits(inner)]
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
    if "$ref" not in schema and schema.get("properties"):
        inner = {name: at_the_limits(one) for name, one in schema["properties"].items()}
        found += [{name: value} for name, values in inner.items() for value in values]
    return [value for value in found if not (type(value) is float and value.is_integer())]


@pytest.mark.parametrize("route", ROUTES)
def test_schema_and_parser_agree_on_every_field(route: str) -> None:
    keys = [{key: 1} for key in ("5", "05", "5\n", "five", str(10**19))]
    function = {"type": "function", "function": {"name": "add"}}
    forms = [{"type": kind} for kind in ("text", "json_object", "json_schema", "function", "tool", "auto", "disabled")]
    forms += [{"type": "json_schema", "schema": {}}, {"type": "json_schema", "json_schema": {"schema": True}}]
    words = ["auto", "none", "required", "text", "chat", ["text"], 1, 2, "{}", "true", *keys, *forms, function]
    for name, field in body_schema(route)["properties"].items():
        for value in [*words, *HOSTILE, *at_the_limits(field)]:
            body = {**minimal(route), name: value}
            result = outcome(route, body)
            if isinstance(result, ApiError) and (is_across(result) or result.code == "invalid_unicode"):
                continue
            if (type(value) is float and (not math.isfinite(value) or value.is_integer())) or value == 10**400:
                continue  # of which JSON Schema has another opinion
            assert isinstance(result, ApiError) != VALIDATORS[route].is_valid(body), (name, value)


ENTRIES = {
    "dialog": {"role": "user", "content": "a"},
    "messages": {"role": "user", "content": "a"},
    "input": {"role": "user", "content": "a"},
}
"""Fields whose entries are objects: a valid one."""


@pytest.mark.parametrize("route", ROUTES)
def test_schema_and_parser_agree_on_the_length_of_lists_of_objects(route: str) -> None:
    for name, field in body_schema(route)["properties"].items():
        if name not in ENTRIES:
            continue
        for length in (field["maxItems"], field["maxItems"] + 1):
            body = {**minimal(route), name: [ENTRIES[name]] * length}
            result = outcome(route, body)
            if not isinstance(result, ApiError) or not is_across(result):
                assert isinstance(result, ApiError) != VALIDATORS[route].is_valid(body), name


@pytest.mark.parametrize(
    ("route", "tool"),
    [
        ("v1/chat/completions", lambda name: {"type": "function", "function": {"name": name}}),
        ("v1/responses", lambda name: {"type": "function", "name": name}),
        ("v1/messages", lambda name: {"name": name, "input_schema": {"type": "object"}}),
    ],
)
def test_schema_and_parser_agree_on_the_number_of_tools_and_their_names(route: str, tool: Any) -> None:
    limit = body_schema(route)["properties"]["tools"]["maxItems"]
    lists = [[f"f{at}" for at in range(limit + more)] for more in (0, 1)]
    lists += [["a" * length] for length in (0, 1, 128, 129)] + [["a b"], ["a\n"], ["é"], ["a.b-c_D"]]
    outcomes = set()
    for names in lists:
        body = {**minimal(route), "tools": [tool(name) for name in names]}
        refused = isinstance(outcome(route, body), ApiError)
        assert refused != VALIDATORS[route].is_valid(body), names[:2]
        outcomes.add(refused)
    assert outcomes == {True, False}


def test_an_integer_with_a_fraction_is_one_for_json_schema_only() -> None:
    assert VALIDATORS[""].is_valid({"prompt": "a", "n": 1.0})
    assert outcome("", {"prompt": "a", "n": 1.0}).code == "invalid_type"


def test_the_rules_that_the_schema_cannot_express_are_documented() -> None:
    page = (ROOT / "docs/openapi.md").read_text()
    assert not [rule.param for rule in ACROSS_FIELDS if f"`{rule.param}`" not in page]


# --- replies

TOKENIZER = tiny("sentencepiece")
USAGE = Usage(3, 5, 1)
ALTERNATIVES = Logprobs(-0.5, ((7, -0.5), (8, float("-inf"))))
SCORED: dict[str, dict[str, Any]] = {
    "": {"logprobs": True, "top_logprobs": 2},
    "v1/chat/completions": {"logprobs": True, "top_logprobs": 2, "return_token_ids": True},
    "v1/completions": {"logprobs": 2, "return_token_ids": True},
    "v1/responses": {
        "include": ["message.output_text.logprobs"],
        "top_logprobs": 2,
        "instructions": "Be brief.",
        "metadata": {"a": "b"},
        "tools": [{"type": "function", "name": "add"}],
        "tool_choice": {"type": "function", "name": "add"},
        "text": {"format": {"type": "json_schema", "name": "any", "schema": {}}},
        "user": "me",
    },
    "v1/messages": {},
}
"""By dialect: optional fields of bodies that make replies as large as they can be."""
WHOLE: dict[str, dict[str, Any]] = {
    "": {"prompt_logprobs": 2},
    "v1/chat/completions": {"prompt_logprobs": 2},
    "v1/completions": {"prompt_logprobs": 2, "echo": True},
}
"""Further ones that are not possible in a stream."""
STREAMED: dict[str, dict[str, Any]] = {
    "v1/chat/completions": {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    "v1/completions": {"stream_options": {"include_usage": True, "continuous_usage_stats": True}, "echo": True},
}
"""Further ones of streams."""
CALLING = ("v1/chat/completions", "v1/responses", "v1/messages")
"""The dialects with tools."""


def test_the_replies_of_every_dialect_are_checked_here() -> None:
    assert SCORED.keys() == DIALECTS.keys()


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
    return DIALECTS[route].replies(Accepted("id", request, [[1, 2, 3]]), TOKENIZER, 16)


def delta(
    index: int, finish_reason: FinishReason | None, *, scored: bool = False, calls: tuple[ToolCallDelta, ...] = ()
) -> OutputDelta:
    return OutputDelta(
        index=index,
        text="" if calls else "a",
        ids=[7],
        logprobs=[ALTERNATIVES] if scored else None,
        prompt_logprobs=[ALTERNATIVES] * 2 if scored else None,
        finish_reason=finish_reason,
        error=None,
        tool_calls=calls,
    )


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("route", DIALECTS)
def test_an_answer_has_the_declared_fields_and_no_other(route: str, full: bool, n: int) -> None:
    if n > 1 and "n" not in body_schema(route)["properties"]:
        pytest.skip("it has one answer")
    fields = {**SCORED[route], **WHOLE.get(route, {})} if full else {}
    reasons = (FinishReason.STOP, FinishReason.LENGTH)
    outputs = [delta(index, reasons[index], scored=full) for index in range(n)]

    answer = replies_to(route, {**fields, **({"n": n} if n > 1 else {})}).answer(outputs, USAGE)

    reply_validator(route, "application/json").validate(json.loads(answer))


@pytest.mark.parametrize("arguments", ['{"a": 1}', "", '{"a'])
@pytest.mark.parametrize("route", CALLING)
def test_an_answer_with_calls_has_the_declared_fields_and_no_other(route: str, arguments: str) -> None:
    calls = (ToolCallDelta(0, arguments, "add"), ToolCallDelta(1, "{}", "sub"))
    answer = replies_to(route, {}).answer([delta(0, FinishReason.STOP, calls=calls)], USAGE)
    assert b"add" in answer
    reply_validator(route, "application/json").validate(json.loads(answer))


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("route", DIALECTS)
def test_a_stream_consists_of_the_declared_items(route: str, full: bool) -> None:
    fields = {**SCORED[route], **STREAMED.get(route, {})} if full else {}
    replies = replies_to(route, {**fields, "stream": True})

    stream = replies.chunk([delta(0, None, scored=full)], None)
    stream += replies.chunk([delta(0, FinishReason.LENGTH, scored=full)], USAGE)

    assert len(checked_items(route, replies, stream)) >= 2


@pytest.mark.parametrize("route", CALLING)
def test_a_stream_with_calls_consists_of_the_declared_items(route: str) -> None:
    replies = replies_to(route, {"stream": True})
    pieces = [ToolCallDelta(0, "", "add"), ToolCallDelta(0, '{"a": 1}'), ToolCallDelta(1, "{}", "sub")]

    stream = replies.chunk([delta(0, None)], None)
    for piece in pieces:
        stream += replies.chunk([delta(0, None, calls=(piece,))], None)
    stream += replies.chunk([delta(0, FinishReason.STOP)], USAGE)

    assert b"add" in stream
    assert len(checked_items(route, replies, stream)) >= 5


@pytest.mark.parametrize("status", [429, 500])
@pytest.mark.parametrize("route", DIALECTS)
def test_a_stream_that_fails_consists_of_the_declared_items(route: str, status: int) -> None:
    replies = replies_to(route, {"stream": True})
    stream = replies.chunk([delta(0, None)], None)
    stream += replies.error(ApiError(status, "nan_logits", "no number"))
    assert len(checked_items(route, replies, stream)) >= 2


def checked_items(route: str, replies: Any, stream: bytes) -> list[Any]:
    """The items of a stream, which are valid."""
    checked = reply_validator(route, replies.chunk_type)
    items = items_of(stream)
    for item in items:
        checked.validate(item)
    return items


def items_of(stream: bytes) -> list[Any]:
    lines = (line.removeprefix(b"data: ") for line in stream.splitlines())
    return [json.loads(line) for line in lines if line.startswith(b"{")]


@pytest.mark.parametrize("route", QUERIES)
def test_an_answer_to_a_query_has_the_declared_fields_and_no_other(route: str) -> None:
    schema = body_schema(route)["properties"]
    for more in ({}, {"return_token_strs": True}):
        if more.keys() <= schema.keys():
            answer = outcome(route, {**minimal(route), **more})
            assert isinstance(answer, bytes)
            reply_validator(route, "application/json").validate(json.loads(answer))


def test_documents_have_the_declared_fields_and_no_other() -> None:
    for route, document in SERVED.documents.items():
        content = DOCUMENT["paths"][f"/{route}"]["get"]["responses"]["200"]["content"]
        (kind,) = content
        assert document.content_type.partition(";")[0] == kind
        schema = {**content[kind]["schema"], "components": {"schemas": DEFINITIONS}}
        value = json.loads(document.body) if kind == "application/json" else document.body.decode()
        jsonschema_rs.Draft202012Validator(closed(copy.deepcopy(schema))).validate(value)


@pytest.mark.parametrize("route", ROUTES)
def test_an_error_has_the_declared_fields_and_no_other(route: str) -> None:
    answering = {**DIALECTS, **QUERIES}[route]
    responses = DOCUMENT["paths"][f"/{route}"]["post"]["responses"]
    for status in (400, 401, 404, 429, 500, 503):
        content = responses[f"{status // 100}XX"]["content"]["application/json"]
        ours, torchserves = content["schema"]["anyOf"]
        assert torchserves == {"$ref": "#/components/schemas/FrontendError"}
        error = answering.error(ApiError(status, "some_code", "wait", None))
        validator(closed(copy.deepcopy({**ours}))).validate(json.loads(error))
    name = ours["$ref"].rpartition("/")[2]
    assert name == ("AnthropicErrorBody" if route.startswith("v1/messages") else "ErrorBody")
    assert DEFINITIONS["Error"]["required"] == ["message", "type", "param", "code"]
