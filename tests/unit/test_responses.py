"""OpenAI's Responses API: what it accepts, what it refuses, and how it answers."""

from __future__ import annotations

import json
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_tp.engine.request import FinishReason, Logprobs
from llama_tp.engine.sampling_params import KNOBS
from llama_tp.serving.dialects.base import Accepted
from llama_tp.serving.dialects.openai.responses.request import Body
from llama_tp.serving.dialects.openai.routes import openai_dialects
from llama_tp.serving.errors import ApiError
from llama_tp.serving.fields import MAX_NEW_TOKENS
from llama_tp.serving.generation import GenerationRequest, OutputDelta, RequestDefaults, Usage
from llama_tp.serving.reply_size import MAX_CHUNK_BYTES, MAX_CHUNK_TOKENS
from llama_tp.text.dialog import Message
from llama_tp.text.grammar import Grammar
from llama_tp.text.tools.calls import ToolCallDelta, ToolChoice
from tests.unit.text_fixtures import tiny

SAMPLING = {knob.name: knob.default for knob in KNOBS} | {"temperature": 0.6, "top_p": 0.9, "top_k": 7}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
ADD = {"type": "function", "name": "add", "description": "Adds.", "parameters": SCHEMA, "strict": True}
TOOLS = ({"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": SCHEMA}},)
LOGPROBS = "message.output_text.logprobs"


def dialect(*configured: str) -> Any:
    defaults = RequestDefaults(
        mode="chat", max_new_tokens=100, seed=42, sampling=SAMPLING, configured=frozenset(configured)
    )
    return openai_dialects(defaults, ("llama",))["v1/responses"]


DIALECT = dialect()


def parse(body: object = None, /, **fields: Any) -> GenerationRequest:
    return DIALECT.parse(json.dumps({"input": "Hi", **fields}).encode() if body is None else body)


def refusal(body: object = None, /, **fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse(body, **fields)
    error = json.loads(DIALECT.error(caught.value))["error"]
    assert error.keys() == {"message", "type", "param", "code"}
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
        instructions="Be brief.",
        max_output_tokens=9,
        seed=3,
        stream=True,
        stream_options={"include_obfuscation": True},
        tools=[ADD],
        tool_choice={"type": "function", "name": "add"},
        parallel_tool_calls=False,
        text={"format": {"type": "json_schema", "name": "sum", "schema": SCHEMA, "strict": True}},
        include=[LOGPROBS],
        top_logprobs=5,
    )
    assert {name: getattr(request.sampling, name) for name in knobs} == knobs
    sampling = request.sampling
    assert (sampling.max_new_tokens, request.max_new_tokens_explicit, sampling.seed, sampling.logprobs) == (
        9,
        True,
        3,
        5,
    )
    assert request.dialog == (Message("system", "Be brief."), Message("user", "Hi"))
    assert request.tools == TOOLS
    assert request.tool_choice == ToolChoice("required", "add", parallel=False)
    assert request.grammar == Grammar.json_schema(SCHEMA)
    assert request.stream


def test_what_is_not_given_has_openai_s_default() -> None:
    request = parse()
    assert {knob.name: getattr(request.sampling, knob.name) for knob in KNOBS} == {k.name: k.default for k in KNOBS}
    assert (request.sampling.max_new_tokens, request.max_new_tokens_explicit) == (MAX_NEW_TOKENS, False)
    assert (request.grammar, request.tools, request.tool_choice) == (None, (), ToolChoice())
    configured = dialect("top_p", "max_new_tokens").parse({"input": "Hi"}).sampling
    assert (configured.top_p, configured.temperature, configured.max_new_tokens) == (0.9, 1.0, 100)


@pytest.mark.parametrize(
    ("form", "grammar"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, Grammar.json_object()),
        ({"type": "json_schema", "name": "x", "schema": SCHEMA, "description": "x"}, Grammar.json_schema(SCHEMA)),
    ],
)
def test_the_format_of_the_text_is_a_grammar(form: dict[str, Any], grammar: Grammar | None) -> None:
    assert parse(text={"format": form, "verbosity": "medium"}).grammar == grammar


@pytest.mark.parametrize("mode", ["auto", "none", "required"])
def test_a_tool_choice_is_a_word_or_names_a_function(mode: Any) -> None:
    assert parse(tools=[ADD], tool_choice=mode).tool_choice == ToolChoice(mode)


CALL = {"type": "function_call", "call_id": "call_1", "name": "add", "arguments": '{"a": 1}'}
CALLED = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
RESULT = {"type": "function_call_output", "call_id": "call_1", "output": "4"}


def test_items_are_a_dialog_with_a_message_for_each_result() -> None:
    said = {"type": "output_text", "text": "I add.", "annotations": [], "logprobs": []}
    items = [
        {"role": "developer", "content": "Answer in English."},
        {"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "x"},
        {"type": "message", "id": "msg_1", "status": "completed", "role": "assistant", "content": [said]},
        {**CALL, "id": "fc_1", "status": "completed"},
        {**CALL, "call_id": "call_2"},
        {**RESULT, "output": [{"type": "input_text", "text": "4"}]},
        {**RESULT, "call_id": "call_2", "id": None},
        {"type": "message", "role": "user", "content": "Well?"},
        {"type": "message", "role": "user", "content": "So?"},
    ]
    request = parse(instructions="Be brief.", input=items)
    assert request.dialog == (
        Message("system", "Be brief.\nAnswer in English."),
        Message("user", "a\nb"),
        Message("assistant", "I add.", tool_calls=(CALLED, {**CALLED, "id": "call_2"})),
        Message("tool", "4", tool_call_id="call_1", name="add"),
        Message("tool", "4", tool_call_id="call_2", name="add"),
        Message("user", "Well?"),
        Message("user", "So?"),
    )
    assert request.names.messages == ("instructions", *(f"input[{at}]" for at in (1, 3, 6, 7, 8, 9)))


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
    (b'{"input": "\\ud800"}', "invalid_unicode"),
    (b"{}", "missing_field"),
]


@pytest.mark.parametrize(("body", "code"), BAD_BODIES, ids=[repr(body[:20]) for body, _ in BAD_BODIES])
def test_a_body_that_is_no_request_is_refused(body: bytes, code: str) -> None:
    assert (refusal(body).status, refusal(body).code) == (400, code)


def said(content: object, role: object = "user") -> dict[str, Any]:
    return {"input": [{"role": role, "content": content}]}


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"temprature": 0}, "unknown_field", "temprature"),
    ({"messages": []}, "unknown_field", "messages"),
    ({"max_tokens": 5}, "unknown_field", "max_tokens"),
    *(({"max_output_tokens": value}, "invalid_value", "max_output_tokens") for value in (0, -1, 10**9, 1e9)),
    *(({"max_output_tokens": value}, "invalid_type", "max_output_tokens") for value in ("5", 5.5, True)),
    *(({"temperature": value}, "invalid_value", "temperature") for value in (-1, 2.1)),
    *(({"temperature": value}, "invalid_type", "temperature") for value in ("hot", True)),
    *(({"top_p": value}, "invalid_value", "top_p") for value in (0, 1.1)),
    ({"top_k": -2}, "invalid_value", "top_k"),
    ({"top_k": 1.5}, "invalid_type", "top_k"),
    ({"min_p": 2}, "invalid_value", "min_p"),
    *(({"seed": value}, "invalid_value", "seed") for value in (2**64, -1)),
    ({"seed": 1.5}, "invalid_type", "seed"),
    ({"stream": "yes"}, "invalid_type", "stream"),
    ({"model": 5}, "invalid_type", "model"),
    *(({"input": value}, "empty_prompt", "input") for value in ("", [])),
    *(({"input": value}, "invalid_type", "input") for value in (5, None, {}, True)),
    ({"input": [{"role": "user", "content": "Hi"}] * 8193}, "invalid_value", "input"),
    ({"input": [123]}, "invalid_type", "input[0]"),
    ({"input": [{}]}, "invalid_type", "input[0].role"),
    ({"input": [{"role": "user"}]}, "invalid_type", "input[0].content"),
    (said("Hi", 5), "invalid_type", "input[0].role"),
    (said("Hi", "tool"), "invalid_value", "input[0].role"),
    (said(None), "invalid_type", "input[0].content"),
    (said(5), "invalid_type", "input[0].content"),
    (said([5]), "invalid_type", "input[0].content[0]"),
    (said([{"type": "input_text"}]), "invalid_type", "input[0].content[0].text"),
    (said([{"type": "input_text", "text": 5}]), "invalid_type", "input[0].content[0].text"),
    (said([{"type": "input_text", "text": "a", "x": 1}]), "unknown_field", "input[0].content[0].x"),
    *(
        (said([{"type": kind, "file_id": "x"}]), "unsupported_value", "input[0].content[0]")
        for kind in ("input_image", "input_file", "refusal", "")
    ),
    *(
        ({"input": [{"type": kind, "id": "x"}]}, "unsupported_value", "input[0]")
        for kind in ("item_reference", "computer_call", "web_search_call", "")
    ),
    ({"input": [{"type": 5}]}, "invalid_type", "input[0].role"),
    ({"input": [CALL, {**RESULT, "call_id": "call_2"}]}, "invalid_value", "input[1].call_id"),
    ({"input": [{**CALL, "arguments": "[]"}]}, "invalid_value", "input[0].arguments"),
    ({"input": [{**CALL, "arguments": {}}]}, "invalid_type", "input[0].arguments"),
    ({"input": [{**CALL, "name": "a b"}]}, "invalid_value", "input[0].name"),
    ({"input": [CALL, {**RESULT, "output": 5}]}, "invalid_type", "input[1].output"),
    ({"instructions": 5}, "invalid_type", "instructions"),
    ({"tools": 5}, "invalid_type", "tools"),
    ({"tools": [5]}, "invalid_type", "tools[0]"),
    ({"tools": [{**ADD, "parameters": []}]}, "invalid_type", "tools[0].parameters"),
    ({"tools": [{**ADD, "name": "a b"}]}, "invalid_value", "tools[0].name"),
    ({"tools": [ADD, ADD]}, "invalid_value", "tools[1]"),
    ({"tools": [{"type": "web_search", "filters": {}}]}, "unsupported_value", "tools[0].type"),
    ({"tools": [{"type": "function", "function": {"name": "add"}}]}, "unknown_field", "tools[0].function"),
    ({"tool_choice": "any"}, "invalid_value", "tool_choice"),
    ({"tool_choice": 5}, "invalid_type", "tool_choice"),
    ({"tool_choice": "required"}, "conflicting_fields", "tool_choice"),
    ({"tool_choice": {"type": "function"}}, "invalid_value", "tool_choice"),
    ({"tool_choice": {"type": "allowed_tools", "tools": []}}, "unsupported_value", "tool_choice"),
    ({"tools": [ADD], "tool_choice": {"type": "function", "name": "sub"}}, "invalid_value", "tool_choice"),
    ({"text": {"format": {"type": "xml"}}}, "invalid_value", "text.format"),
    ({"text": {"format": {"type": "json_schema"}}}, "invalid_type", "text.format"),
    ({"text": {"format": {"type": "json_object", "schema": {}}}}, "unknown_field", "text.format.schema"),
    ({"text": {"verbosity": "low"}}, "unsupported_value", "text.verbosity"),
    ({"top_logprobs": 5}, "conflicting_fields", "top_logprobs"),
    ({"top_logprobs": 21}, "invalid_value", "top_logprobs"),
    ({"include": ["message.input_image.image_url"]}, "unsupported_value", "include[0]"),
    ({"include": LOGPROBS}, "invalid_type", "include"),
    ({"metadata": {"a": 1}}, "invalid_type", "metadata.a"),
    ({"store": True}, "unsupported_value", "store"),
    ({"background": True}, "unsupported_value", "background"),
    ({"previous_response_id": "resp_1"}, "unsupported_value", "previous_response_id"),
    ({"conversation": "conv_1"}, "unsupported_value", "conversation"),
    ({"truncation": "auto"}, "unsupported_value", "truncation"),
    ({"prompt": {"id": "x"}}, "unsupported_value", "prompt"),
    ({"reasoning": {"effort": "high"}}, "unsupported_value", "reasoning"),
    ({"context_management": [{"type": "compaction"}]}, "unsupported_value", "context_management"),
]


@pytest.mark.parametrize(("fields", "code", "param"), BAD, ids=[str(row[0])[:60] for row in BAD])
def test_a_bad_field_is_refused_by_name(fields: dict[str, Any], code: str, param: str) -> None:
    error = refusal(**fields)
    assert (error.status, error.code, error.param) == (400, code, param)
    assert param.partition("[")[0].partition(".")[0] in error.message
    assert "\n" not in error.message


def test_a_request_for_another_model_is_told_which_one_there_is() -> None:
    error = refusal(model="gpt-4o")
    assert (error.status, error.code, error.param) == (404, "model_not_found", "model")


HARMLESS: dict[str, Any] = {
    "store": False,
    "background": False,
    "truncation": "disabled",
    "include": ["reasoning.encrypted_content"],
    "reasoning": {"effort": "none", "summary": None},
    "text": {"verbosity": "medium"},
    "prompt_cache_retention": "24h",
    "service_tier": "auto",
    "tools": [],
    "tool_choice": "auto",
    "context_management": [],
}


def test_what_would_change_nothing_is_accepted() -> None:
    assert parse(**HARMLESS) == parse()


def test_null_means_that_a_field_is_not_given() -> None:
    fields = Body.model_fields.items()
    assert parse(**{name: None for name, field in fields if not field.is_required()}) == parse()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
items = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "type": st.sampled_from(["message", "function_call", "function_call_output", "reasoning"]) | json_values,
            "role": st.sampled_from(["user", "assistant"]) | json_values,
            **dict.fromkeys(("content", "call_id", "name", "arguments", "output", "summary"), json_values),
        },
    ),
    max_size=3,
)


@settings(deadline=None, max_examples=500)
@given(data=st.data())
def test_any_value_of_any_field_is_accepted_or_refused_in_one_line(data: st.DataObject) -> None:
    names = sorted(Body.model_fields)
    fields = data.draw(st.dictionaries(st.sampled_from(names) | st.text("abc_", max_size=5), json_values, max_size=3))
    if data.draw(st.booleans()):
        fields["input"] = data.draw(items)
    problem = None
    try:
        request = DIALECT.parse({"input": "Hi", **fields})
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


def replies(longest: int = 16, **fields: Any) -> Any:
    return DIALECT.replies(Accepted("some-uuid", parse(**fields), [list(range(7))]), TOKENIZER, longest)


def delta(words: str = "", **fields: Any) -> OutputDelta:
    given: dict[str, Any] = {"index": 0, "text": words, "ids": (), "logprobs": None}
    return OutputDelta(**{**given, "finish_reason": None, "error": None, **fields})


def answer(*deltas: OutputDelta, **fields: Any) -> dict[str, Any]:
    """The response, as the official client's types have it."""
    types = pytest.importorskip("openai.types.responses")
    body = json.loads(replies(**fields).answer(list(deltas), USAGE))
    types.Response.model_validate(body)
    return body


def events(body: bytes) -> list[Any]:
    """The data of server-sent events, as a client reads them, which are what the official client's types have."""
    types = pytest.importorskip("openai.types.responses")
    adapter = pytest.importorskip("pydantic").TypeAdapter(types.ResponseStreamEvent)
    *lines, rest = body.split(b"\n\n")
    assert rest == b""
    parsed = []
    for line in lines:
        if line != b":":
            name, _, data = line.partition(b"\n")
            assert b"\n" not in data
            parsed.append(json.loads(data.removeprefix(b"data: ")))
            assert name == b"event: " + parsed[-1]["type"].encode()
            assert adapter.validate_python(parsed[-1]).type == parsed[-1]["type"]
    assert [one["sequence_number"] for one in parsed] == list(range(len(parsed)))
    return parsed


def without_times(response: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in response.items() if not key.endswith("_at")}


def test_an_answer_is_a_response() -> None:
    response = answer(delta("a", **END), instructions="Be brief.", metadata={"a": "b"}, user="me", temperature=0.5)
    assert response["created_at"] > 1_700_000_000
    assert (response["id"], response["object"], response["status"]) == ("resp_some-uuid", "response", "completed")
    (item,) = response["output"]
    assert item["content"] == [{"type": "output_text", "text": "a", "annotations": [], "logprobs": []}]
    assert (item["type"], item["role"], item["status"]) == ("message", "assistant", "completed")
    assert response["usage"] == {
        "input_tokens": 7,
        "input_tokens_details": {"cached_tokens": 3, "cache_write_tokens": 0},
        "output_tokens": 5,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 12,
    }


def test_an_answer_repeats_the_request_s_fields_with_the_defaults_used() -> None:
    form = {"type": "json_schema", "name": "sum", "schema": SCHEMA, "strict": True}
    given = {
        "instructions": "Be brief.",
        "max_output_tokens": 9,
        "metadata": {"a": "b"},
        "user": "me",
        "temperature": 0.5,
        "tools": [ADD],
        "tool_choice": {"type": "function", "name": "add"},
        "parallel_tool_calls": False,
        "prompt_cache_key": "x",
        "safety_identifier": "y",
    }
    response = answer(delta("a", **END), text={"format": form}, **given)
    assert {key: response[key] for key in given} == given
    assert response["text"] == {"format": form, "verbosity": "medium"}
    bare = answer(delta("a", **END))
    expected = {
        "store": False,
        "temperature": 1.0,
        "top_p": 1.0,
        "tools": [],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "text": {"format": {"type": "text"}, "verbosity": "medium"},
        "metadata": {},
        "truncation": "disabled",
        "top_logprobs": 0,
    }
    assert {key: bare[key] for key in expected} == expected


def test_an_answer_that_is_cut_off_is_incomplete() -> None:
    response = answer(delta("a", finish_reason=FinishReason.LENGTH))
    assert response["status"] == response["output"][0]["status"] == "incomplete"
    assert (response["incomplete_details"], response["completed_at"]) == ({"reason": "max_output_tokens"}, None)
    *_, last = events(replies(stream=True).chunk([delta("a", finish_reason=FinishReason.LENGTH)], USAGE))
    assert last["type"] == "response.incomplete"
    assert without_times(last["response"]) == without_times(response)


CALLS = (ToolCallDelta(0, "", "add"), ToolCallDelta(0, '{"a": '), ToolCallDelta(0, "1}"), ToolCallDelta(1, "{}", "sub"))


def test_a_stream_is_the_response_in_events() -> None:
    formatter = replies(stream=True)
    chunks = [
        formatter.chunk([delta()], None),
        formatter.chunk([delta("a")], None),
        formatter.chunk([delta()], None),
        formatter.chunk([delta('"b"\n')], None),
        formatter.chunk([delta(tool_calls=CALLS[:2])], None),
        formatter.chunk([delta(tool_calls=CALLS[2:], **END)], USAGE),
    ]
    assert chunks[2] == b":\n\n"
    stream = events(b"".join(chunks))
    assert [one["type"].removeprefix("response.") for one in stream] == [
        *(
            "created",
            "in_progress",
            "output_item.added",
            "content_part.added",
            "output_text.delta",
            "output_text.delta",
        ),
        *("output_text.done", "content_part.done", "output_item.done"),
        *("output_item.added", "function_call_arguments.delta", "function_call_arguments.delta"),
        *("function_call_arguments.done", "output_item.done"),
        *("output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"),
        "completed",
    ]
    whole = answer(delta('a"b"\n', tool_calls=CALLS, **END))
    assert without_times(stream[-1]["response"]) == without_times(whole)
    message, first, second = whole["output"]
    assert message["content"][0]["text"] == 'a"b"\n'
    assert (first["type"], first["name"], first["arguments"]) == ("function_call", "add", '{"a": 1}')
    assert (second["name"], second["arguments"]) == ("sub", "{}")
    assert first["call_id"] != second["call_id"]
    assert [one["item"] for one in stream if one["type"] == "response.output_item.done"] == whole["output"]
    assert stream[0]["response"]["status"] == "in_progress"


def test_the_official_client_adds_up_a_stream_to_the_response() -> None:
    """The oracle: the state of its stream helper."""
    helper = pytest.importorskip("openai.lib.streaming.responses._responses")
    types = pytest.importorskip("openai.types.responses")
    adapter = pytest.importorskip("pydantic").TypeAdapter(types.ResponseStreamEvent)
    state = helper.ResponseStreamState(input_tools=[], text_format=pytest.importorskip("openai").omit)
    formatter = replies(stream=True)
    body = formatter.chunk([delta("a")], None) + formatter.chunk([delta("b", tool_calls=CALLS, **END)], USAGE)
    snapshots = [one for event in events(body) for one in state.handle_event(adapter.validate_python(event))]
    assert [one.snapshot for one in snapshots if one.type == "response.output_text.delta"] == ["a", "ab"]
    assert snapshots[-1].response.output_text == "ab"


@pytest.mark.parametrize("reason", [FinishReason.STOP, FinishReason.LENGTH])
def test_an_empty_answer_is_a_message_without_text(reason: FinishReason) -> None:
    response = answer(delta(finish_reason=reason))
    assert [item["content"][0]["text"] for item in response["output"]] == [""]
    *_, last = events(replies(stream=True).chunk([delta(finish_reason=reason)], USAGE))
    assert without_times(last["response"]) == without_times(response)


def test_an_answer_of_calls_alone_has_no_message() -> None:
    response = answer(delta(tool_calls=CALLS, **END))
    assert [item["type"] for item in response["output"]] == ["function_call", "function_call"]
    *_, last = events(replies(stream=True).chunk([delta(tool_calls=CALLS, **END)], USAGE))
    assert without_times(last["response"]) == without_times(response)


def test_logprobs_are_in_the_answer_and_in_the_deltas_of_a_stream() -> None:
    ids = TOKENIZER.encode("quick fox")[:2]
    fields = {"include": [LOGPROBS], "top_logprobs": 1}
    full = delta(
        "quick", ids=ids, logprobs=[Logprobs(-0.5, ((ids[0], -0.5),)), Logprobs(-1.0, ((ids[1], -1.0),))], **END
    )
    response = answer(full, **fields)
    logprobs = response["output"][0]["content"][0]["logprobs"]
    assert [bytes(one["bytes"]) for one in logprobs] == [TOKENIZER.token_bytes(token) for token in ids]
    assert [one["logprob"] for one in logprobs] == [-0.5, -1.0]
    assert response["top_logprobs"] == 1
    stream = events(replies(**fields, stream=True).chunk([full], USAGE))
    assert [one["logprobs"] for one in stream if one["type"] == "response.output_text.delta"] == [logprobs]


def test_an_error_is_an_object_before_the_stream_and_an_event_in_it() -> None:
    error = ApiError(500, "nan_logits", "bad")
    formatter = replies(stream=True)
    assert json.loads(formatter.error(error)) == {"error": error.fields()}
    body = formatter.chunk([delta("a")], None) + formatter.error(error)
    problem, failed = events(body)[-2:]
    assert (problem["type"], problem["code"], problem["message"]) == ("error", "nan_logits", "bad")
    assert (failed["type"], failed["response"]["status"]) == ("response.failed", "failed")
    assert failed["response"]["error"] == {"code": "server_error", "message": "bad"}
    assert failed["response"]["output"][0]["content"][0]["text"] == "a"
    formatter = replies(stream=True)
    with pytest.raises((AssertionError, IndexError)):
        formatter.chunk([delta(tool_calls=[ToolCallDelta(0, "more of a call that has not begun")])], None)
    assert json.loads(formatter.error(error)) == {"error": error.fields()}, "nothing of the stream has been sent"
    broken = delta(finish_reason=FinishReason.ERROR, error=error)
    for reply in (lambda: replies().answer([broken], USAGE), lambda: replies(stream=True).chunk([broken], USAGE)):
        with pytest.raises(ApiError) as caught:
            reply()
        assert caught.value is error


@pytest.mark.parametrize("byte", [b"\x00", b"\xff", b'"', b"a"])
@pytest.mark.parametrize(("top", "longest"), [(None, 128), (0, 128), (20, 128), (20, 48), (5, 256)])
def test_no_event_with_new_text_exceeds_the_limit_whatever_the_tokens(
    byte: bytes, top: int | None, longest: int
) -> None:
    class Words:
        special_ids: ClassVar[dict[str, int]] = {}

        @staticmethod
        def token_bytes(_: int) -> bytes:
            return byte * longest

    fields: dict[str, Any] = {} if top is None else {"include": [LOGPROBS], "top_logprobs": top}
    formatter = DIALECT.replies(Accepted("x" * 36, parse(**fields, stream=True), [[1]]), Words, longest)
    count = formatter.chunk_tokens
    assert 1 <= count <= MAX_CHUNK_TOKENS
    value = -1.2345678901234567e-300
    logprobs = None if top is None else [Logprobs(value, tuple((one, value) for one in range(top)))] * count
    text = (byte * longest).decode("utf-8", "replace") * count + "\x00" * 256
    formatter.chunk([delta()], None)
    body = formatter.chunk([delta(text, ids=[10**6] * count, logprobs=logprobs)], None)
    assert max(map(len, body.split(b"\n\n"))) <= MAX_CHUNK_BYTES - 2
