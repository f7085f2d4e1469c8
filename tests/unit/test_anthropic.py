"""Anthropic's dialect: what its routes accept, what they refuse, and how they answer."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_tp.engine.request import FinishReason
from llama_tp.engine.sampling_params import KNOBS
from llama_tp.serving.dialects.anthropic.request import MessagesRequest
from llama_tp.serving.dialects.anthropic.routes import anthropic_dialects, anthropic_queries
from llama_tp.serving.dialects.base import Accepted
from llama_tp.serving.errors import ApiError
from llama_tp.serving.generation import GenerationRequest, OutputDelta, RequestDefaults, Usage
from llama_tp.serving.reply_size import MAX_CHUNK_BYTES, MAX_CHUNK_TOKENS
from llama_tp.text.dialog import Message
from llama_tp.text.grammar import Grammar
from llama_tp.text.tools.calls import ToolCallDelta, ToolChoice
from tests.unit.text_fixtures import tiny

SAMPLING = {knob.name: knob.default for knob in KNOBS} | {"temperature": 0.6, "top_p": 0.9, "top_k": 7}
HI = [{"role": "user", "content": "Hi"}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
ADD = {"name": "add", "description": "Adds.", "input_schema": SCHEMA}
TOOLS = ({"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": SCHEMA}},)
ASKED: dict[str, Any] = {"max_tokens": 9, "messages": HI}


def dialect(*configured: str) -> Any:
    defaults = RequestDefaults(
        mode="chat", max_new_tokens=100, seed=42, sampling=SAMPLING, configured=frozenset(configured)
    )
    return anthropic_dialects(defaults, ("llama",))["v1/messages"]


DIALECT = dialect()


def parse(body: object = None, /, **fields: Any) -> GenerationRequest:
    return DIALECT.parse(json.dumps({**ASKED, **fields}).encode() if body is None else body)


def refusal(body: object = None, /, **fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse(body, **fields)
    error = json.loads(DIALECT.error(caught.value))
    assert error.keys() == {"type", "error"}
    assert error["error"].keys() == {"type", "message"}
    assert (error["type"], error["error"]["message"]) == ("error", caught.value.message)
    return caught.value


# --- requests


def test_every_field_has_its_effect() -> None:
    knobs = {
        "temperature": 0,
        "top_p": 1,
        "top_k": 0,
        "min_p": 1,
        "repetition_penalty": 1.1,
        "presence_penalty": -2,
        "frequency_penalty": 2,
    }
    request = parse(
        **knobs,
        model="llama",
        seed=3,
        stop_sequences=["a", "b"],
        stream=True,
        tools=[ADD],
        tool_choice={"type": "tool", "name": "add", "disable_parallel_tool_use": True},
        output_config={"format": {"type": "json_schema", "schema": SCHEMA}},
    )
    assert {name: getattr(request.sampling, name) for name in knobs} == knobs
    assert (request.sampling.max_new_tokens, request.max_new_tokens_explicit, request.sampling.seed) == (9, True, 3)
    assert (request.stop, request.stream) == (("a", "b"), True)
    assert request.tools == TOOLS
    assert request.tool_choice == ToolChoice("required", "add", parallel=False)
    assert request.grammar == Grammar.json_schema(SCHEMA)


def test_what_the_configuration_sets_goes_before_the_defaults_of_the_api() -> None:
    assert {knob.name: getattr(parse().sampling, knob.name) for knob in KNOBS} == {k.name: k.default for k in KNOBS}
    sampling = dialect("top_p", "max_new_tokens").parse(ASKED).sampling
    assert (sampling.top_p, sampling.temperature, sampling.max_new_tokens, sampling.seed) == (0.9, 1.0, 9, 42)


@pytest.mark.parametrize(
    ("choice", "parsed"),
    [
        ({"type": "auto"}, ToolChoice("auto")),
        ({"type": "any"}, ToolChoice("required")),
        ({"type": "tool", "name": "add"}, ToolChoice("required", "add")),
        ({"type": "none"}, ToolChoice("none")),
        ({"type": "auto", "disable_parallel_tool_use": True}, ToolChoice("auto", parallel=False)),
    ],
)
def test_a_tool_choice_has_four_types(choice: dict[str, Any], parsed: ToolChoice) -> None:
    assert parse(tools=[ADD], tool_choice=choice).tool_choice == parsed


def test_a_schema_has_two_places() -> None:
    form = {"type": "json_schema", "schema": SCHEMA}
    assert parse(output_format=form).grammar == parse(output_config={"format": form}).grammar
    both = refusal(output_format=form, output_config={"format": {"type": "json_schema", "schema": {}}})
    assert (both.code, both.param) == ("conflicting_fields", "output_format")


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words, "cache_control": {"type": "ephemeral"}, "citations": None}


CALL = {"type": "tool_use", "id": "toolu_1", "name": "add", "input": {"a": 1}, "caller": {"type": "direct"}}
CALLED = {"id": "toolu_1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


def result(**fields: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": "toolu_1", **fields}


def test_a_conversation_with_tools_is_a_dialog_with_a_message_for_each_result() -> None:
    thought = {"type": "thinking", "thinking": "Hm.", "signature": "x"}
    redacted = {"type": "redacted_thinking", "data": "x"}
    messages = [
        {"role": "user", "content": [text("a"), text("b")]},
        {"role": "assistant", "content": [thought, redacted, text("I add."), CALL]},
        {"role": "user", "content": [result(content="4"), text("Well?")]},
        {"role": "assistant", "content": [CALL]},
        {"role": "user", "content": [result(content=[text("5"), text("6")], is_error=True), result()]},
    ]
    request = parse(system=[text("Be"), text("brief.")], messages=messages, tools=[ADD])
    assert request.dialog == (
        Message("system", "Be\nbrief."),
        Message("user", "a\nb"),
        Message("assistant", "I add.", tool_calls=(CALLED,), reasoning_content="Hm."),
        Message("tool", "4", tool_call_id="toolu_1", name="add"),
        Message("user", "Well?"),
        Message("assistant", "", tool_calls=(CALLED,)),
        Message("tool", "Error: 5\n6", tool_call_id="toolu_1", name="add"),
        Message("tool", "", tool_call_id="toolu_1", name="add"),
    )
    assert request.names.messages == (
        *("system", "messages[0]", "messages[1]", "messages[2].content[0]", "messages[2]", "messages[3]"),
        *("messages[4].content[0]", "messages[4].content[1]"),
    )
    assert not request.continue_final_message


def test_successive_messages_of_one_role_are_one_turn() -> None:
    messages = [{"role": "user", "content": word} for word in "ab"]
    assert parse(messages=messages).dialog == (Message("user", "a\nb"),)


def test_an_answer_that_has_begun_is_continued() -> None:
    request = parse(messages=[*HI, {"role": "assistant", "content": "Well"}])
    assert request.continue_final_message
    unanswered = refusal(messages=[*HI, {"role": "assistant", "content": [text("Well"), CALL]}])
    assert (unanswered.code, unanswered.param) == ("invalid_role_order", "messages[1]")


# --- refusals: reliability's table, in this dialect

BAD_BODIES = [
    (b"", "invalid_json"),
    (b"not json", "invalid_json"),
    (b"\x1f\x8b\x08\x00", "invalid_utf8"),
    ('{"prompt": "x"}'.encode("utf-16"), "invalid_utf8"),
    (b"[]", "not_an_object"),
    (b"42", "not_an_object"),
    (b"null", "not_an_object"),
    (b"[" * 100_000, "too_deep"),
    (b'{"top_k": 1, "top_k": 2}', "duplicate_key"),
    (b'{"temperature": NaN}', "invalid_json"),
    (b'{"temperature": 1e999}', "invalid_value"),
    (b'{"top_k": ' + b"9" * 5000 + b"}", "invalid_value"),
    (b'{"system": "\\ud800"}', "invalid_unicode"),
    (b"{}", "missing_field"),
    (b'{"messages": [{"role": "user", "content": "Hi"}]}', "missing_field"),
    (b'{"max_tokens": 5}', "missing_field"),
]


@pytest.mark.parametrize(("body", "code"), BAD_BODIES, ids=[repr(body[:20]) for body, _ in BAD_BODIES])
def test_a_body_that_is_no_request_is_refused(body: bytes, code: str) -> None:
    assert (refusal(body).status, refusal(body).code) == (400, code)


def said(content: object, role: object = "user") -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content}]}


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"temprature": 0}, "unknown_field", "temprature"),
    ({"prompt": "Hi"}, "unknown_field", "prompt"),
    ({"stop": "a"}, "unknown_field", "stop"),
    *(({"max_tokens": value}, "invalid_value", "max_tokens") for value in (0, -1, 10**9, 1e9)),
    *(({"max_tokens": value}, "invalid_type", "max_tokens") for value in ("5", 5.5, True, None)),
    *(({"temperature": value}, "invalid_value", "temperature") for value in (-1, 2.1)),
    *(({"temperature": value}, "invalid_type", "temperature") for value in ("hot", True)),
    *(({"top_p": value}, "invalid_value", "top_p") for value in (0, 1.1)),
    ({"top_k": -2}, "invalid_value", "top_k"),
    ({"top_k": 1.5}, "invalid_type", "top_k"),
    ({"min_p": 2}, "invalid_value", "min_p"),
    *(({"seed": value}, "invalid_value", "seed") for value in (2**64, -1)),
    ({"seed": 1.5}, "invalid_type", "seed"),
    ({"stop_sequences": "a"}, "invalid_type", "stop_sequences"),
    ({"stop_sequences": [""]}, "invalid_value", "stop_sequences[0]"),
    ({"stop_sequences": [1]}, "invalid_type", "stop_sequences[0]"),
    ({"stop_sequences": list("abcde")}, "too_many_stops", "stop_sequences"),
    ({"stop_sequences": ["a" * 10_000]}, "invalid_value", "stop_sequences[0]"),
    ({"stream": "yes"}, "invalid_type", "stream"),
    ({"model": 5}, "invalid_type", "model"),
    ({"messages": None}, "invalid_type", "messages"),
    ({"messages": []}, "empty_messages", "messages"),
    ({"messages": "Hi"}, "invalid_type", "messages"),
    ({"messages": HI * 8193}, "invalid_value", "messages"),
    ({"messages": [123]}, "invalid_type", "messages[0]"),
    ({"messages": [{}]}, "invalid_type", "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "invalid_type", "messages[0].content"),
    ({"messages": [*HI, {"role": "user", "content": None}]}, "invalid_type", "messages[1].content"),
    ({"messages": [{**HI[0], "name": "Ann"}]}, "unknown_field", "messages[0].name"),
    (said("Hi", 5), "invalid_type", "messages[0].role"),
    (said("Hi", "tool"), "invalid_value", "messages[0].role"),
    (said(5), "invalid_type", "messages[0].content"),
    (said({}), "invalid_type", "messages[0].content"),
    (said([5]), "invalid_type", "messages[0].content[0]"),
    (said([{}]), "invalid_type", "messages[0].content[0].type"),
    (said([{"type": 5}]), "invalid_value", "messages[0].content[0].type"),
    (said([{"type": "text"}]), "invalid_type", "messages[0].content[0].text"),
    (said([text("a"), {"type": "text", "text": 5}]), "invalid_type", "messages[0].content[1].text"),
    (said([{**text("a"), "weight": 1}]), "unknown_field", "messages[0].content[0].weight"),
    *(
        (said([text("a"), {"type": kind}]), "unsupported_value", "messages[0].content[1]")
        for kind in ("image", "document", "search_result", "server_tool_use", "container_upload", "")
    ),
    (said([CALL]), "invalid_role", "messages[0].content[0]"),
    (said([result()], "assistant"), "invalid_role", "messages[0].content[0]"),
    (said([{"type": "thinking", "thinking": "Hm."}]), "invalid_role", "messages[0].content[0]"),
    (said([result()]), "invalid_value", "messages[0].content[0].tool_use_id"),
    (said([result(content=[{"type": "image"}])]), "unsupported_value", "messages[0].content[0].content[0]"),
    (said([result(content=5)]), "invalid_type", "messages[0].content[0].content"),
    (said([result(is_error="yes")]), "invalid_type", "messages[0].content[0].is_error"),
    (said([{**CALL, "input": "{}"}], "assistant"), "invalid_type", "messages[0].content[0].input"),
    (said([{**CALL, "name": "a b"}], "assistant"), "invalid_value", "messages[0].content[0].name"),
    ({"system": 5}, "invalid_type", "system"),
    ({"system": [{"type": "image"}]}, "unsupported_value", "system[0]"),
    ({"tools": 5}, "invalid_type", "tools"),
    ({"tools": [5]}, "invalid_type", "tools[0]"),
    ({"tools": [{"name": "add"}]}, "invalid_type", "tools[0].input_schema"),
    ({"tools": [{**ADD, "input_schema": []}]}, "invalid_type", "tools[0].input_schema"),
    ({"tools": [{**ADD, "input_schema": {"type": "array"}}]}, "invalid_value", "tools[0].input_schema.type"),
    ({"tools": [{**ADD, "name": "a b"}]}, "invalid_value", "tools[0].name"),
    ({"tools": [ADD, ADD]}, "invalid_value", "tools[1]"),
    ({"tools": [{**ADD, "defer_loading": True}]}, "unsupported_value", "tools[0].defer_loading"),
    ({"tools": [{**ADD, "name": f"f{at}"} for at in range(129)]}, "invalid_value", "tools"),
    *(
        ({"tools": [{"type": kind, "name": "x", "max_uses": 3}]}, "unsupported_value", "tools[0].type")
        for kind in ("web_search_20250305", "bash_20250124", 5)
    ),
    ({"tool_choice": {"type": "any"}}, "conflicting_fields", "tool_choice"),
    ({"tool_choice": {"type": "tool"}}, "invalid_value", "tool_choice"),
    ({"tool_choice": {"type": "required"}}, "invalid_value", "tool_choice.type"),
    ({"tool_choice": "auto"}, "invalid_type", "tool_choice"),
    ({"tools": [ADD], "tool_choice": {"type": "tool", "name": "sub"}}, "invalid_value", "tool_choice"),
    ({"output_format": {"type": "text"}}, "invalid_value", "output_format"),
    ({"output_config": {"format": {"type": "json_schema"}}}, "invalid_type", "output_config.format"),
    ({"output_config": {"format": 5}}, "invalid_type", "output_config.format"),
    (
        {"output_config": {"format": {"type": "json_schema", "schema": {}, "x": 1}}},
        *("unknown_field", "output_config.format.x"),
    ),
    ({"output_config": {"effort": "low"}}, "unsupported_value", "output_config.effort"),
    ({"thinking": {"type": "enabled", "budget_tokens": 2048}}, "unsupported_value", "thinking"),
    ({"thinking": 5}, "invalid_type", "thinking"),
    (
        {"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}},
        *("unsupported_value", "context_management"),
    ),
    ({"container": "x"}, "unsupported_value", "container"),
    ({"mcp_servers": [{}]}, "unsupported_value", "mcp_servers"),
    ({"speed": "fast"}, "unsupported_value", "speed"),
]


@pytest.mark.parametrize(("fields", "code", "param"), BAD, ids=[str(row[0])[:60] for row in BAD])
def test_a_bad_field_is_refused_by_name(fields: dict[str, Any], code: str, param: str) -> None:
    error = refusal(**fields)
    assert (error.status, error.code, error.param) == (400, code, param)
    assert param.partition("[")[0].partition(".")[0] in error.message
    assert "\n" not in error.message


def test_a_request_for_another_model_is_told_which_one_there_is() -> None:
    error = refusal(model="claude-sonnet-4-5")
    assert (error.status, error.message) == (
        404,
        'model="claude-sonnet-4-5" does not exist; this server has "llama"',
    )
    assert json.loads(DIALECT.error(error))["error"]["type"] == "not_found_error"


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (404, "not_found_error"),
        (429, "rate_limit_error"),
        (500, "api_error"),
        (503, "overloaded_error"),
    ],
)
def test_an_error_has_the_type_of_its_status(status: int, kind: str) -> None:
    """The oracle: the official client's types."""
    shared = pytest.importorskip("anthropic.types.shared")
    body = json.loads(DIALECT.error(ApiError(status, "code", "message")))
    parsed = shared.ErrorResponse.model_validate({**body, "request_id": None})
    assert (parsed.error.type, parsed.error.message) == (kind, "message")


def test_what_would_change_nothing_is_accepted() -> None:
    harmless = {
        "metadata": {"user_id": "me"},
        "service_tier": "auto",
        "thinking": {"type": "disabled"},
        "cache_control": {"type": "ephemeral"},
        "inference_geo": "eu",
        "speed": "standard",
        "mcp_servers": [],
        "output_config": {"effort": "high"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "tools": [],
        "tool_choice": {"type": "auto"},
    }
    assert parse(**harmless) == parse()
    assert parse(tools=[{**ADD, "type": "custom", "strict": True, "eager_input_streaming": True}]).tools == TOOLS


def test_null_means_that_a_field_is_not_given() -> None:
    fields = MessagesRequest.model_fields.items()
    assert parse(**{name: None for name, field in fields if not field.is_required()}) == parse()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
blocks = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "thinking", "tool_use", "tool_result", "image"]) | json_values},
    optional=dict.fromkeys(("text", "thinking", "id", "name", "input", "tool_use_id", "content"), json_values),
)
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant"]), "content": st.lists(blocks, max_size=3) | json_values}
    ),
    max_size=3,
)


@settings(deadline=None, max_examples=500)
@given(data=st.data())
def test_any_value_of_any_field_is_accepted_or_refused_in_one_line(data: st.DataObject) -> None:
    names = sorted(MessagesRequest.model_fields)
    fields = data.draw(st.dictionaries(st.sampled_from(names) | st.text("abc_", max_size=5), json_values, max_size=3))
    if data.draw(st.booleans()):
        fields["messages"] = data.draw(messages)
    problem = None
    try:
        request = DIALECT.parse({**ASKED, **fields})
    except ApiError as error:
        problem = error
    if problem is None:
        assert request.dialog is not None
        assert len(request.dialog) == len(request.names.messages)
    else:
        assert problem.status in (400, 404)
        assert problem.message.isprintable()
        json.loads(DIALECT.error(problem))


# --- replies

TOKENIZER = tiny("sentencepiece")
USAGE = Usage(prompt_tokens=7, completion_tokens=5, cached_tokens=3)
END = {"finish_reason": FinishReason.STOP}


def replies(prompt: list[int] | None = None, longest: int = 16, **fields: Any) -> Any:
    return DIALECT.replies(Accepted("some-uuid", parse(**fields), [prompt or list(range(7))]), TOKENIZER, longest)


def delta(words: str = "", **fields: Any) -> OutputDelta:
    given: dict[str, Any] = {"index": 0, "text": words, "ids": (), "logprobs": None}
    return OutputDelta(**{**given, "finish_reason": None, "error": None, **fields})


def called(index: int, arguments: str, name: str | None = None) -> dict[str, Any]:
    return {"tool_calls": [ToolCallDelta(index, arguments, name)]}


def events(body: bytes) -> list[Any]:
    """The data of server-sent events, as a client reads them."""
    *lines, rest = body.split(b"\n\n")
    assert rest == b""
    parsed = []
    for line in lines:
        name, _, data = line.partition(b"\n")
        assert b"\n" not in data
        parsed.append(json.loads(data.removeprefix(b"data: ")))
        assert name == b"event: " + parsed[-1]["type"].encode()
    return parsed


def message_of(stream: list[Any]) -> Any:
    """The message that the official client makes of a stream."""
    types = pytest.importorskip("anthropic.types")
    accumulate = pytest.importorskip("anthropic.lib.streaming._messages").accumulate_event
    adapter = pytest.importorskip("pydantic").TypeAdapter(types.RawMessageStreamEvent)
    snapshot = None
    buffers: dict[int, bytes] = {}
    for one in stream:
        if one["type"] != "ping":
            snapshot = accumulate(event=adapter.validate_python(one), current_snapshot=snapshot, json_bufs=buffers)
    return snapshot


def test_an_answer_is_a_message() -> None:
    answer = json.loads(replies().answer([delta("a", **END)], USAGE))
    assert answer == {
        "id": "msg_some-uuid",
        "type": "message",
        "role": "assistant",
        "model": "llama",
        "content": [{"type": "text", "text": "a"}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": 4,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 3,
            "output_tokens": 5,
        },
    }


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        ({"finish_reason": FinishReason.STOP}, "end_turn"),
        ({"finish_reason": FinishReason.STOP, "stop_string": "b"}, "stop_sequence"),
        ({"finish_reason": FinishReason.LENGTH}, "max_tokens"),
        ({"finish_reason": FinishReason.STOP, **called(0, "{}", "add")}, "tool_use"),
        ({"finish_reason": FinishReason.LENGTH, **called(0, "{", "add")}, "max_tokens"),
    ],
)
def test_a_message_says_why_it_ended(end: dict[str, Any], reason: str) -> None:
    answer = json.loads(replies().answer([delta("a", **end)], USAGE))
    assert (answer["stop_reason"], answer["stop_sequence"]) == (reason, end.get("stop_string"))
    assert message_of(events(replies(stream=True).chunk([delta("a", **end)], USAGE))).stop_reason == reason


CALLS = (ToolCallDelta(0, "", "add"), ToolCallDelta(0, '{"a": '), ToolCallDelta(0, "1}"), ToolCallDelta(1, "{}", "sub"))


def test_a_stream_is_the_message_in_events() -> None:
    formatter = replies(stream=True)
    chunks = [
        formatter.chunk([delta()], None),
        formatter.chunk([delta("a")], None),
        formatter.chunk([delta()], None),
        formatter.chunk([delta('"b"\n')], None),
        formatter.chunk([delta(tool_calls=CALLS[:2])], None),
        formatter.chunk([delta(tool_calls=CALLS[2:], **END)], USAGE),
    ]
    stream = events(b"".join(chunks))
    assert [one["type"] for one in stream] == [
        *("message_start", "ping", "content_block_start", "content_block_delta", "ping", "content_block_delta"),
        *("content_block_stop", "content_block_start", "content_block_delta", "content_block_delta"),
        *("content_block_stop", "content_block_start", "content_block_delta", "content_block_stop"),
        *("message_delta", "message_stop"),
    ]
    assert stream[0]["message"]["usage"]["input_tokens"] == 7
    whole = json.loads(replies().answer([delta('a"b"\n', tool_calls=CALLS, **END)], USAGE))
    assert message_of(stream).to_dict(exclude_none=True) == {key: whole[key] for key in whole if whole[key] is not None}
    first, second, third = whole["content"]
    assert first == {"type": "text", "text": 'a"b"\n'}
    assert (second["type"], second["name"], second["input"]) == ("tool_use", "add", {"a": 1})
    assert (third["name"], third["input"]) == ("sub", {})
    assert second["id"] != third["id"]
    assert second["id"].startswith("toolu_")


def test_an_answer_without_text_has_no_block_of_text() -> None:
    assert json.loads(replies().answer([delta(**END)], USAGE))["content"] == []
    assert message_of(events(replies(stream=True).chunk([delta(**END)], USAGE))).content == []
    calls = {"tool_calls": [ToolCallDelta(0, "", "add")]}
    (block,) = json.loads(replies().answer([delta(**calls, **END)], USAGE))["content"]
    assert (block["name"], block["input"]) == ("add", {})


@pytest.mark.parametrize("arguments", ['{"a": ', "[]", "[" * 100_000])
def test_arguments_that_are_no_object_are_passed_on_as_text(arguments: str) -> None:
    (block,) = json.loads(replies().answer([delta(**called(0, arguments, "add"), **END)], USAGE))["content"]
    assert block["input"] == {"INVALID_JSON": arguments}


def test_an_error_is_an_object_before_the_stream_and_an_event_in_it() -> None:
    error = ApiError(500, "nan_logits", "bad")
    formatter = replies(stream=True)
    expected = {"type": "error", "error": {"type": "api_error", "message": "bad"}}
    assert json.loads(formatter.error(error)) == expected
    formatter.chunk([delta("a")], None)
    assert events(formatter.error(error)) == [expected]
    formatter = replies(stream=True)
    with pytest.raises((AssertionError, IndexError)):
        formatter.chunk([delta(**called(0, "more of a call that has not begun"))], None)
    assert json.loads(formatter.error(error)) == expected, "nothing of the stream has been sent"
    failed = delta(finish_reason=FinishReason.ERROR, error=error)
    for reply in (lambda: replies().answer([failed], USAGE), lambda: replies(stream=True).chunk([failed], USAGE)):
        with pytest.raises(ApiError) as caught:
            reply()
        assert caught.value is error


@pytest.mark.parametrize("byte", [b"\x00", b"\xff", b'"', b"a"])
@pytest.mark.parametrize("longest", [16, 128, 256])
def test_no_event_exceeds_the_limit_whatever_the_tokens(byte: bytes, longest: int) -> None:
    formatter = replies(longest=longest, stream=True)
    count = formatter.chunk_tokens
    assert 1 <= count <= MAX_CHUNK_TOKENS
    words = (byte * longest).decode("utf-8", "replace") * count + "\x00" * 256
    for full in (delta(words, **END), delta(**called(0, words, "x" * 128), **END)):
        body = replies(longest=longest, stream=True).chunk([full], USAGE)
        assert max(map(len, body.split(b"\n\n"))) <= MAX_CHUNK_BYTES - 2


# --- count_tokens


class Prompts:
    """Counts the words of a dialog."""

    tokenizer = TOKENIZER
    max_seq_len = 512

    def prompt_ids(self, request: GenerationRequest) -> list[int]:
        assert request.dialog is not None
        return [0] * sum(len(message.content.split()) for message in request.dialog)


def test_tokens_are_counted_without_the_fields_of_generation() -> None:
    defaults = RequestDefaults(mode="chat", max_new_tokens=100, seed=42, sampling=SAMPLING)
    query = anthropic_queries(defaults, ("llama",))["v1/messages/count_tokens"]
    body = {"model": "llama", "system": "Be brief.", "messages": HI, "tools": [ADD], "thinking": {"type": "disabled"}}
    assert json.loads(query.answer(json.dumps(body).encode(), Prompts())) == {"input_tokens": 3}
    with pytest.raises(ApiError) as caught:
        query.answer({**body, "max_tokens": 5}, Prompts())
    assert (caught.value.code, caught.value.param) == ("unknown_field", "max_tokens")
    assert json.loads(query.error(caught.value))["type"] == "error"
