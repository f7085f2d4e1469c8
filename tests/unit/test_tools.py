"""Tools and tool calls in requests: what is accepted, what is refused by name, and the form they leave in."""

from __future__ import annotations

import re
from typing import Any

import pytest

from llama_tp.serving.dialects.tools import ChatToolCalls, ChatTools, call_id, check_choice, function_tool
from llama_tp.serving.errors import ApiError
from llama_tp.serving.fields import ABSENT
from llama_tp.serving.strict_model import StrictModel, validate
from llama_tp.text.tools.calls import ToolChoice

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


class Body(StrictModel):
    tools: ChatTools = ABSENT
    tool_calls: ChatToolCalls = ABSENT


def tool(**function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "add", **function}}


def call(**function: Any) -> dict[str, Any]:
    return {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": "{}", **function}}


def test_a_tool_leaves_with_the_fields_that_a_template_may_print() -> None:
    full = tool(description="Adds.", parameters=SCHEMA)
    strict = tool(description="Adds.", parameters=SCHEMA, strict=True)
    assert validate(Body, {"tools": [full]}).tools == (full,)
    assert validate(Body, {"tools": [strict]}).tools == (full,)
    bare = tool(description=None, parameters=None, strict=None)
    assert validate(Body, {"tools": [bare]}).tools == (tool(),)


@pytest.mark.parametrize("name", ["a", "A-b_c.9", "x" * 128])
def test_a_name_has_the_characters_that_openai_and_anthropic_allow(name: str) -> None:
    assert validate(Body, {"tools": [tool(name=name)]}).tools == (tool(name=name),)


def test_the_arguments_of_a_call_become_an_object() -> None:
    calls = [call(arguments='{"a": 1}'), call(arguments=""), {**call(), "index": 0}]
    parsed = validate(Body, {"tool_calls": calls}).tool_calls
    assert [one["function"]["arguments"] for one in parsed] == [{"a": 1}, {}, {}]
    assert parsed[2] == {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": {}}}


BAD_TOOLS: list[tuple[object, str, str]] = [
    (5, "invalid_type", "tools"),
    ([5], "invalid_type", "tools[0]"),
    ([{}], "invalid_type", "tools[0].type"),
    ([{"type": "function"}], "invalid_type", "tools[0].function"),
    ([{"type": 5}], "invalid_type", "tools[0].type"),
    ([{**tool(), "type": "custom"}], "unsupported_value", "tools[0].type"),
    ([tool(name="")], "invalid_value", "tools[0].function.name"),
    ([tool(name="a b")], "invalid_value", "tools[0].function.name"),
    ([tool(name="a\n")], "invalid_value", "tools[0].function.name"),
    ([tool(name="é")], "invalid_value", "tools[0].function.name"),
    ([tool(name="x" * 129)], "invalid_value", "tools[0].function.name"),
    ([tool(description=5)], "invalid_type", "tools[0].function.description"),
    ([tool(parameters=[])], "invalid_type", "tools[0].function.parameters"),
    ([tool(parameters={"type": "array"})], "invalid_value", "tools[0].function.parameters.type"),
    ([tool(parameters={"type": ["object"]})], "invalid_value", "tools[0].function.parameters.type"),
    ([tool(strict="yes")], "invalid_type", "tools[0].function.strict"),
    ([tool(schema={})], "unknown_field", "tools[0].function.schema"),
    ([tool(), tool(name="b"), tool()], "invalid_value", "tools[2]"),
    ([tool(name=f"f{at}") for at in range(129)], "invalid_value", "tools"),
]
BAD_CALLS: list[tuple[object, str, str]] = [
    (5, "invalid_type", "tool_calls"),
    ([{"function": {"name": "add", "arguments": "{}"}}], "invalid_type", "tool_calls[0].id"),
    ([{**call(), "type": "custom"}], "unsupported_value", "tool_calls[0].type"),
    ([call(name="a b")], "invalid_value", "tool_calls[0].function.name"),
    *(([call(arguments=text)], "invalid_value", "tool_calls[0].function.arguments") for text in ("[]", "{", "5", "x")),
    ([call(arguments="[" * 100_000)], "invalid_value", "tool_calls[0].function.arguments"),
    ([call(arguments='{"a": 1e999}')], "invalid_value", "tool_calls[0].function.arguments"),
    ([call(arguments='{"a": "\\ud800"}')], "invalid_value", "tool_calls[0].function.arguments"),
    ([call(arguments={})], "invalid_type", "tool_calls[0].function.arguments"),
]
BAD = [*(("tools", *row) for row in BAD_TOOLS), *(("tool_calls", *row) for row in BAD_CALLS)]


@pytest.mark.parametrize(("field", "value", "code", "param"), BAD, ids=[f"{row[0]}={row[1]}"[:60] for row in BAD])
def test_a_bad_tool_or_call_is_refused_by_name(field: str, value: object, code: str, param: str) -> None:
    with pytest.raises(ApiError) as caught:
        validate(Body, {field: value})
    assert (caught.value.status, caught.value.code, caught.value.param) == (400, code, param)
    assert "\n" not in caught.value.message


def test_128_tools_are_accepted() -> None:
    assert len(validate(Body, {"tools": [tool(name=f"f{at}") for at in range(128)]}).tools) == 128


def test_a_demanded_call_needs_a_tool_of_that_name() -> None:
    tools = [function_tool("add", None, None)]
    check_choice(ToolChoice("required", "add"), tools, "tool_choice")
    check_choice(ToolChoice("required"), tools, "tool_choice")
    check_choice(ToolChoice("auto"), [], "tool_choice")
    with pytest.raises(ApiError) as caught:
        check_choice(ToolChoice("required"), [], "tool_choice")
    assert (caught.value.code, caught.value.param) == ("conflicting_fields", "tool_choice")
    with pytest.raises(ApiError) as caught:
        check_choice(ToolChoice("required", "sub"), tools, "tool_choice")
    assert caught.value.message == 'tool_choice names "sub", which is not one of the tools: add'


def test_the_id_of_a_call_is_reproducible_and_unique() -> None:
    ids = [call_id("call_", request, output=n, call=at) for request in ("a", "b") for n in (0, 1) for at in (0, 1)]
    assert len(set(ids)) == 8
    assert all(re.fullmatch("call_[0-9a-f]{24}", one) for one in ids)
    assert call_id("call_", "a", call=0) == ids[0]
