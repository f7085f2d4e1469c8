"""OpenAI's dialect: what its routes accept, what they refuse, and how they answer."""

from __future__ import annotations

import json
import math
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_tp.engine.request import FinishReason, Logprobs
from llama_tp.engine.sampling_params import KNOBS
from llama_tp.serving.dialects.base import Accepted
from llama_tp.serving.dialects.openai import chat, completions, unsupported
from llama_tp.serving.dialects.openai.routes import model_documents, openai_dialects
from llama_tp.serving.dialects.unsupported import IGNORED
from llama_tp.serving.errors import ApiError
from llama_tp.serving.fields import MAX_NEW_TOKENS
from llama_tp.serving.generation import GenerationRequest, OutputDelta, RequestDefaults, Usage
from llama_tp.serving.reply_size import MAX_CHUNK_BYTES, MAX_CHUNK_TOKENS
from llama_tp.text.dialog import Message
from tests.unit.text_fixtures import tiny

SAMPLING = {knob.name: knob.default for knob in KNOBS} | {"temperature": 0.6, "top_p": 0.9, "top_k": 7}
HI = [{"role": "user", "content": "Hi"}]
CHAT, COMPLETIONS = "v1/chat/completions", "v1/completions"
ASKED: dict[str, dict[str, Any]] = {CHAT: {"messages": HI}, COMPLETIONS: {"prompt": "Hi"}}
ROUTES = list(ASKED)


def dialects(*configured: str) -> Any:
    defaults = RequestDefaults(
        mode="chat", max_new_tokens=100, seed=42, sampling=SAMPLING, configured=frozenset(configured)
    )
    return openai_dialects(defaults, ("llama", "llama-tp-7"))


DIALECTS = dialects()


def parse(route: str, body: object = None, /, **fields: Any) -> GenerationRequest:
    return DIALECTS[route].parse(json.dumps({**ASKED[route], **fields}).encode() if body is None else body)


def refusal(route: str, body: object = None, /, **fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse(route, body, **fields)
    error = json.loads(DIALECTS[route].error(caught.value))["error"]
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
    for route in ROUTES:
        request = parse(
            route,
            **knobs,
            model="llama",
            max_tokens=9,
            min_tokens=3,
            seed=0,
            n=2,
            stop="a",
            stream=True,
            stop_token_ids=[5],
            ignore_eos=True,
            logit_bias={"7": -1},
            return_token_ids=True,
            stream_options={"include_usage": True},
        )
        assert {name: getattr(request.sampling, name) for name in knobs} == knobs
        sampling = request.sampling
        assert (sampling.max_new_tokens, sampling.min_new_tokens, sampling.seed, sampling.n) == (9, 3, 0, 2)
        assert sampling.logit_bias == {7: -1}
        assert request.max_new_tokens_explicit
        assert (request.stop, request.stop_token_ids, request.ignore_eos, request.stream) == (("a",), (5,), True, True)
        assert (request.reply.usage_in_stream, request.reply.token_ids, request.reply.echo) == (True, True, False)


@pytest.mark.parametrize("route", ROUTES)
def test_what_the_configuration_does_not_set_has_openai_s_default(route: str) -> None:
    request = parse(route)
    assert {knob.name: getattr(request.sampling, knob.name) for knob in KNOBS} == {k.name: k.default for k in KNOBS}
    assert (request.sampling.max_new_tokens, request.max_new_tokens_explicit) == (
        {CHAT: MAX_NEW_TOKENS, COMPLETIONS: 16}[route],
        False,
    )
    assert (request.sampling.seed, request.sampling.logprobs, request.stream) == (42, None, False)


@pytest.mark.parametrize("route", ROUTES)
def test_what_the_configuration_sets_goes_before_openai_s_default(route: str) -> None:
    request = dialects("top_p", "max_new_tokens")[route].parse(ASKED[route])
    assert (request.sampling.top_p, request.sampling.temperature) == (0.9, 1.0)
    assert (request.sampling.max_new_tokens, request.max_new_tokens_explicit) == (100, False)


@pytest.mark.parametrize("route", ROUTES)
def test_a_negative_top_k_is_vllm_s_way_to_say_all(route: str) -> None:
    assert parse(route, top_k=-1).sampling.top_k == 0
    assert refusal(route, top_k=-2).code == "invalid_value"


@pytest.mark.parametrize(
    ("route", "fields", "logprobs"),
    [
        (CHAT, {"logprobs": False}, None),
        (CHAT, {"logprobs": True}, 0),
        (CHAT, {"logprobs": True, "top_logprobs": 20}, 20),
        (COMPLETIONS, {"logprobs": None}, None),
        (COMPLETIONS, {"logprobs": 0}, 0),
        (COMPLETIONS, {"logprobs": 5}, 5),
    ],
)
def test_logprobs_are_a_switch_and_a_number_in_one_route_and_a_number_in_the_other(
    route: str, fields: dict[str, Any], logprobs: int | None
) -> None:
    assert parse(route, **fields).sampling.logprobs == logprobs


def test_the_length_has_two_names_in_a_chat() -> None:
    newer = parse(CHAT, max_completion_tokens=7)
    assert (newer.sampling.max_new_tokens, newer.names.max_new_tokens) == (7, "max_completion_tokens")
    assert parse(CHAT, max_tokens=7).names.max_new_tokens == "max_tokens"
    assert parse(CHAT, max_tokens=7, max_completion_tokens=7) == newer
    assert refusal(CHAT, max_tokens=8, max_completion_tokens=7).code == "conflicting_fields"
    assert refusal(CHAT, min_tokens=8, max_completion_tokens=7).message == (
        "min_tokens=8 must be at most max_completion_tokens=7"
    )


def test_a_content_is_text_or_parts_of_text() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": parts, "name": "Ann"},
        {"role": "assistant", "content": "Well", "refusal": None, "tool_calls": None, "annotations": []},
        {"role": "tool", "content": "42", "tool_call_id": "one"},
    ]
    assert parse(CHAT, messages=messages).dialog == (
        Message("system", "Be brief."),
        Message("user", "a\nb", name="Ann"),
        Message("assistant", "Well"),
        Message("tool", "42", tool_call_id="one"),
    )


def test_a_final_message_is_continued_without_a_generation_prompt() -> None:
    for fields in ({}, {"add_generation_prompt": False}):
        assert parse(CHAT, continue_final_message=True, **fields).continue_final_message
    assert not parse(CHAT, add_generation_prompt=True).continue_final_message
    both = refusal(CHAT, continue_final_message=True, add_generation_prompt=True)
    assert (both.code, both.param) == ("conflicting_fields", "add_generation_prompt")
    neither = parse(CHAT, add_generation_prompt=False)
    assert (neither.continue_final_message, neither.add_generation_prompt) == (False, False)


def test_vllm_s_extensions_have_their_effect() -> None:
    for route in ROUTES:
        request = parse(
            route,
            include_stop_str_in_output=True,
            skip_special_tokens=False,
            allowed_token_ids=[3, 5, 3],
            truncate_prompt_tokens=7,
            bad_words=["a", "b c"],
            prompt_logprobs=4,
            max_tokens=0,
        )
        assert (request.keep_stop, request.special_text, request.truncate_prompt_tokens) == (True, True, 7)
        assert request.bad_words == ("a", "b c")
        sampling = request.sampling
        assert (sampling.allowed_ids, sampling.prompt_logprobs, sampling.max_new_tokens) == ({3, 5}, 4, 0)
        options = {"continuous_usage_stats": True}
        streamed = parse(route, stream=True, stream_options=options, return_tokens_as_token_ids=True)
        assert (streamed.reply.continuous_usage, streamed.reply.tokens_as_ids) == (True, True)
        assert not parse(route, stream=True, stream_options={}).reply.continuous_usage
    variables = {"enable_thinking": False, "date": {"of": ["today"]}}
    assert parse(CHAT, chat_template_kwargs=variables).template_variables == variables
    assert not parse(COMPLETIONS, add_special_tokens=False).special_tokens


@pytest.mark.parametrize(
    ("fields", "scores"),
    [
        ({"echo": True}, None),
        ({"echo": True, "max_tokens": 0}, 0),
        ({"echo": True, "logprobs": 3}, 3),
        ({"echo": True, "logprobs": 3, "prompt_logprobs": 5, "max_tokens": 0}, 5),
        ({"logprobs": 3}, None),
        ({"logprobs": 3, "prompt_logprobs": 1}, 1),
    ],
)
def test_a_prompt_is_scored_if_its_log_probabilities_are_in_the_reply(
    fields: dict[str, Any], scores: int | None
) -> None:
    assert parse(COMPLETIONS, **fields).sampling.prompt_logprobs == scores


def test_several_prompts_may_be_texts_and_ids() -> None:
    assert parse(COMPLETIONS, prompt=["a", [1, 2], "b"], n=2).prompts == ("a", (1, 2), "b")
    assert parse(COMPLETIONS, prompt=["a", [1, 2], "b"], n=2).num_outputs == 6


@pytest.mark.parametrize(
    ("prompt", "parsed"), [("Hi", "Hi"), ([1, 2], (1, 2)), (["Hi"], "Hi"), ([[1, 2]], (1, 2)), (" ", " ")]
)
def test_a_prompt_is_a_text_or_ids_or_a_list_of_one_of_these(prompt: object, parsed: object) -> None:
    assert parse(COMPLETIONS, prompt=prompt).prompts == (parsed,)


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
    (b'{"n": 1, "n": 2}', "duplicate_key"),
    (b'{"temperature": NaN}', "invalid_json"),
    (b'{"temperature": Infinity}', "invalid_json"),
    (b'{"temperature": 1e999}', "invalid_value"),
    (b'{"n": ' + b"9" * 5000 + b"}", "invalid_value"),
    (b'{"user": "\\ud800"}', "invalid_unicode"),
]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(("body", "code"), BAD_BODIES, ids=[repr(body[:20]) for body, _ in BAD_BODIES])
def test_a_body_that_is_no_json_object_is_refused(route: str, body: bytes, code: str) -> None:
    assert (refusal(route, body).status, refusal(route, body).code) == (400, code)


ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": "{}"}}
BAD_FIELDS: list[tuple[dict[str, Any], str, str]] = [
    ({"max_new_tokens": 5}, "unknown_field", "max_new_tokens"),
    ({"temprature": 0}, "unknown_field", "temprature"),
    *(({"max_tokens": value}, "invalid_value", "max_tokens") for value in (0, -1, 10**9, 1e9)),
    *(({"max_tokens": value}, "invalid_type", "max_tokens") for value in ("5", 5.5, True)),
    *(({"temperature": value}, "invalid_value", "temperature") for value in (-1, 2.1)),
    *(({"temperature": value}, "invalid_type", "temperature") for value in ("hot", True)),
    *(({"top_p": value}, "invalid_value", "top_p") for value in (0, 1.1)),
    ({"top_k": -2}, "invalid_value", "top_k"),
    ({"top_k": 1.5}, "invalid_type", "top_k"),
    ({"top_k": -1.0}, "invalid_type", "top_k"),
    ({"min_p": 2}, "invalid_value", "min_p"),
    *(({"seed": value}, "invalid_value", "seed") for value in (2**64, -1)),
    ({"seed": 1.5}, "invalid_type", "seed"),
    ({"stop": ""}, "invalid_value", "stop"),
    ({"stop": [""]}, "invalid_value", "stop[0]"),
    ({"stop": [1]}, "invalid_type", "stop[0]"),
    ({"stop": list("abcde")}, "too_many_stops", "stop"),
    ({"stop": "a" * 10_000}, "invalid_value", "stop"),
    ({"n": 0}, "invalid_value", "n"),
    ({"n": 17}, "invalid_value", "n"),
    ({"logit_bias": {"a": 1}}, "invalid_value", "logit_bias.a"),
    ({"stop_token_ids": [-1]}, "token_out_of_range", "stop_token_ids[0]"),
    ({"min_tokens": 6, "max_tokens": 5}, "invalid_value", "min_tokens"),
    ({"stream": "yes"}, "invalid_type", "stream"),
    ({"stream_options": {"include_usage": True}}, "conflicting_fields", "stream_options"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "invalid_type", "stream_options.include_usage"),
    ({"stream": True, "stream_options": {"usage": True}}, "unknown_field", "stream_options.usage"),
    ({"stream": True, "stream_options": 5}, "invalid_type", "stream_options"),
    ({"model": 5}, "invalid_type", "model"),
    ({"best_of": 2}, "unsupported_value", "best_of"),
    ({"store": True}, "unsupported_value", "store"),
    ({"store": 0}, "unsupported_value", "store"),
    ({"prompt_logprobs": -1}, "invalid_value", "prompt_logprobs"),
    ({"prompt_logprobs": 21}, "invalid_value", "prompt_logprobs"),
    ({"prompt_logprobs": 0, "stream": True}, "conflicting_fields", "prompt_logprobs"),
    ({"max_tokens": 0}, "invalid_value", "max_tokens"),
    ({"max_tokens": -1, "prompt_logprobs": 0}, "invalid_value", "max_tokens"),
    ({"allowed_token_ids": []}, "invalid_value", "allowed_token_ids"),
    ({"allowed_token_ids": [1, -1]}, "token_out_of_range", "allowed_token_ids[1]"),
    ({"truncate_prompt_tokens": 0}, "invalid_value", "truncate_prompt_tokens"),
    ({"truncate_prompt_tokens": -1}, "invalid_value", "truncate_prompt_tokens"),
    ({"include_stop_str_in_output": 1}, "invalid_type", "include_stop_str_in_output"),
    ({"skip_special_tokens": "no"}, "invalid_type", "skip_special_tokens"),
    ({"priority": 1}, "unsupported_value", "priority"),
    ({"repeat_penalty": 1.1}, "unsupported_value", "repeat_penalty"),
    ({"mirostat": 2}, "unsupported_value", "mirostat"),
    ({"samplers": ["top_k"]}, "unsupported_value", "samplers"),
    ({"timings_per_token": True}, "unsupported_value", "timings_per_token"),
    ({"n_predict": 5}, "unknown_field", "n_predict"),
    ({"vllm_xargs": {"a": 1}}, "unsupported_value", "vllm_xargs"),
    ({"guided_whitespace_pattern": " "}, "unsupported_value", "guided_whitespace_pattern"),
    ({"bad_words": "x"}, "invalid_type", "bad_words"),
    ({"bad_words": ["x", ""]}, "invalid_value", "bad_words[1]"),
    ({"bad_words": ["x"] * 65}, "invalid_value", "bad_words"),
]
BAD_CHATS: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": "Hi"}, "unknown_field", "prompt"),
    ({"messages": None}, "invalid_type", "messages"),
    ({"messages": []}, "empty_messages", "messages"),
    ({"messages": "Hi"}, "invalid_type", "messages"),
    ({"messages": [123]}, "invalid_type", "messages[0]"),
    ({"messages": [{}]}, "invalid_type", "messages[0].role"),
    ({"messages": [{"role": 5, "content": "Hi"}]}, "invalid_type", "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "invalid_type", "messages[0].content"),
    ({"messages": [*HI, {"role": "user", "content": None}]}, "invalid_type", "messages[1].content"),
    ({"messages": [{"role": "user", "content": 5}]}, "invalid_type", "messages[0].content"),
    ({"messages": [{"role": "user", "content": [5]}]}, "invalid_type", "messages[0].content[0]"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "invalid_type", "messages[0].content[0]"),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}]},
        *("unsupported_value", "messages[0].content[1]"),
    ),
    (
        {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"id": "one"}]}]},
        *("invalid_type", "messages[0].tool_calls[0].function"),
    ),
    ({"messages": [{"role": "user", "content": "Hi", "weight": 1}]}, "unknown_field", "messages[0].weight"),
    ({"logprobs": 5}, "invalid_type", "logprobs"),
    ({"top_logprobs": 5}, "conflicting_fields", "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "invalid_value", "top_logprobs"),
    ({"max_completion_tokens": 0}, "invalid_value", "max_completion_tokens"),
    ({"tools": [{"type": "function"}]}, "invalid_type", "tools[0].function"),
    ({"tools": [{"type": "web_search"}]}, "unsupported_value", "tools[0].type"),
    ({"tools": [ADD, ADD]}, "invalid_value", "tools[1]"),
    ({"tool_choice": "required"}, "conflicting_fields", "tool_choice"),
    ({"tools": [ADD], "tool_choice": "any"}, "invalid_value", "tool_choice"),
    ({"tools": [ADD], "tool_choice": 5}, "invalid_type", "tool_choice"),
    ({"tools": [ADD], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "invalid_value", "tool_choice"),
    (
        {"messages": [{"role": "user", "content": "1 + 2?", "tool_calls": [CALL]}]},
        "invalid_value",
        "messages[0].tool_calls",
    ),
    ({"echo": True}, "unsupported_value", "echo"),
    ({"messages": HI * 8193}, "invalid_value", "messages"),
    ({"chat_template_kwargs": []}, "invalid_type", "chat_template_kwargs"),
    ({"modalities": ["text", "audio"]}, "unsupported_value", "modalities"),
    ({"audio": {"voice": "alloy"}}, "unsupported_value", "audio"),
    ({"reasoning_effort": "high"}, "unsupported_value", "reasoning_effort"),
    ({"verbosity": "low"}, "unsupported_value", "verbosity"),
]
BAD_COMPLETIONS: list[tuple[dict[str, Any], str, str]] = [
    ({"messages": HI}, "unknown_field", "messages"),
    *(({"prompt": value}, "empty_prompt", "prompt") for value in ("", [])),
    *(({"prompt": value}, "empty_prompt", "prompt[0]") for value in ([""], [[]])),
    *(({"prompt": value}, "invalid_type", "prompt") for value in (5, None, {}, True)),
    ({"prompt": [1, "a"]}, "invalid_type", "prompt[1]"),
    ({"prompt": [1, -1]}, "token_out_of_range", "prompt[1]"),
    ({"prompt": [[1, -1]]}, "token_out_of_range", "prompt[0]"),
    ({"prompt": [[[1]]]}, "invalid_type", "prompt[0]"),
    ({"prompt": ["a", ""]}, "empty_prompt", "prompt[1]"),
    ({"prompt": [[1], 2]}, "invalid_type", "prompt[1]"),
    ({"prompt": ["a", [1, True]]}, "invalid_type", "prompt[1]"),
    ({"prompt": ["a"] * 1025}, "invalid_value", "prompt"),
    ({"logprobs": True}, "invalid_type", "logprobs"),
    ({"logprobs": 21}, "invalid_value", "logprobs"),
    ({"suffix": "end"}, "unsupported_value", "suffix"),
]
BAD = [
    *((route, *row) for route in ROUTES for row in BAD_FIELDS),
    *((CHAT, *row) for row in BAD_CHATS),
    *((COMPLETIONS, *row) for row in BAD_COMPLETIONS),
]


@pytest.mark.parametrize(("route", "fields", "code", "param"), BAD, ids=[f"{row[0]} {row[1]}"[:60] for row in BAD])
def test_a_bad_field_is_refused_by_name(route: str, fields: dict[str, Any], code: str, param: str) -> None:
    error = refusal(route, **fields)
    assert (error.status, error.code, error.param) == (400, code, param)
    assert param.partition("[")[0] in error.message
    assert "\n" not in error.message


@pytest.mark.parametrize(("route", "field"), [(CHAT, "messages"), (COMPLETIONS, "prompt")])
def test_without_its_one_required_field_a_request_is_refused(route: str, field: str) -> None:
    error = refusal(route, b"{}")
    assert (error.code, error.param) == ("missing_field", field)


@pytest.mark.parametrize("route", ROUTES)
def test_a_request_for_another_model_is_told_which_one_there_is(route: str) -> None:
    error = refusal(route, model="gpt-4o")
    assert (error.status, error.code, error.param) == (404, "model_not_found", "model")
    assert error.message == 'model="gpt-4o" does not exist; this server has "llama"'
    assert parse(route, model="llama") == parse(route)


HARMLESS: dict[str, Any] = {
    "user": "me",
    "metadata": {"a": "b"},
    "store": False,
    "service_tier": "auto",
    "best_of": 1,
    "response_format": {"type": "text"},
    "skip_special_tokens": True,
    "use_beam_search": False,
    "include_stop_str_in_output": False,
    "return_tokens_as_token_ids": False,
    "prompt_logprobs": None,
    "request_id": "mine",
    "vllm_xargs": {},
    "guided_whitespace_pattern": None,
    "allowed_token_ids": None,
    "truncate_prompt_tokens": None,
    "priority": 0,
    "bad_words": [],
}
LLAMA_CPPS_OWN = {
    "cache_prompt": True,
    "id_slot": -1,
    "n_keep": 0,
    "n_probs": 0,
    "min_keep": 0,
    "typical_p": 1.0,
    "mirostat": 0,
    "mirostat_tau": 5.0,
    "mirostat_eta": 0.1,
    "dynatemp_range": 0,
    "dynatemp_exponent": 1,
    "xtc_probability": 0,
    "xtc_threshold": 0.1,
    "dry_multiplier": 0,
    "dry_base": 1.75,
    "dry_allowed_length": 2,
    "top_n_sigma": -1,
    "dry_penalty_last_n": -1,
    "dry_sequence_breakers": ["\n"],
    "repeat_penalty": 1.0,
    "repeat_last_n": -1,
    "lora": [],
    "timings_per_token": False,
    "return_progress": False,
    "return_tokens": False,
    "post_sampling_probs": False,
    "samplers": None,
    "grammar": None,
    "json_schema": None,
}
"""As its clients send them."""
HARMLESS_IN_CHAT: dict[str, Any] = {
    "tools": [],
    "tool_choice": "none",
    "parallel_tool_calls": True,
    "modalities": ["text"],
    "reasoning_effort": "none",
    "verbosity": "medium",
    "top_logprobs": 0,
    "prediction": {"type": "content", "content": "x"},
    "add_special_tokens": False,
    "chat_template_kwargs": {},
}


@pytest.mark.parametrize("route", ROUTES)
def test_what_would_change_nothing_is_accepted(route: str) -> None:
    assert parse(route, **HARMLESS) == parse(route)
    assert parse(route, **LLAMA_CPPS_OWN) == parse(route)
    assert parse(CHAT, **HARMLESS_IN_CHAT) == parse(CHAT)
    assert parse(COMPLETIONS, suffix="", add_special_tokens=True) == parse(COMPLETIONS)
    options = {"include_usage": False, "include_obfuscation": True}
    assert parse(route, stream=True, stream_options=options) == parse(route, stream=True)


@pytest.mark.parametrize("route", ROUTES)
def test_null_means_that_a_field_is_not_given(route: str) -> None:
    """The official client sends what its user gives it, None included."""
    body = {CHAT: chat, COMPLETIONS: completions}[route]._Body
    nulls = {name: None for name, field in body.model_fields.items() if not field.is_required()}
    assert parse(route, **nulls) == parse(route)


@pytest.mark.parametrize("route", ROUTES)
def test_no_field_that_is_not_implemented_is_taken_without_a_look(route: str) -> None:
    own = {CHAT: unsupported.CHAT, COMPLETIONS: unsupported.COMPLETIONS}[route]
    for name, kind in {**unsupported.EVERYWHERE, **own}.items():
        if kind is not IGNORED:
            assert refusal(route, **{name: {"odd": 1}}).code == "unsupported_value", name


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.parametrize("route", ROUTES)
@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_any_value_of_any_field_is_accepted_or_refused_in_one_line(route: str, data: st.DataObject) -> None:
    names = sorted({CHAT: chat, COMPLETIONS: completions}[route]._Body.model_fields)
    fields = data.draw(st.dictionaries(st.sampled_from(names) | st.text("abc_", max_size=5), json_values, max_size=3))
    problem = None
    try:
        request = DIALECTS[route].parse({**ASKED[route], **fields})
    except ApiError as error:
        problem = error
    if problem is None:
        assert (not request.prompts) == (route == CHAT)
    else:
        assert problem.status in (400, 404)
        assert problem.message.isprintable()
        json.loads(DIALECTS[route].error(problem))


# --- replies

TOKENIZER = tiny("sentencepiece")
USAGE = Usage(prompt_tokens=3, completion_tokens=2, cached_tokens=1)
OPENAI_USAGE = {
    "prompt_tokens": 3,
    "completion_tokens": 2,
    "total_tokens": 5,
    "prompt_tokens_details": {"cached_tokens": 1},
}


def replies(route: str, prompt: list[int] | None = None, longest: int = 16, **fields: Any) -> Any:
    request = parse(route, **fields)
    ids = TOKENIZER.encode("Hi", bos=True) if prompt is None else prompt
    return DIALECTS[route].replies(Accepted("some-uuid", request, [ids]), TOKENIZER, longest)


def delta(index: int = 0, text: str = "", ids: Any = (), logprobs: Any = None, **fields: Any) -> OutputDelta:
    return OutputDelta(
        **{"index": index, "text": text, "ids": ids, "logprobs": logprobs, "finish_reason": None, "error": None}
        | fields
    )


def events(body: bytes) -> list[Any]:
    """The data of server-sent events, as a client reads them."""
    *lines, rest = body.split(b"\n\n")
    assert rest == b""
    assert all(line.startswith(b"data: ") and b"\n" not in line for line in lines)
    return [line if line == b"data: [DONE]" else json.loads(line[6:]) for line in lines]


END = {"finish_reason": FinishReason.STOP}


def test_a_chat_s_answer_is_a_chat_completion() -> None:
    body = replies(CHAT, n=2).answer([delta(0, "a", [5], **END), delta(1, "b", [6], **END)], USAGE)
    answer = json.loads(body)
    assert answer.pop("created") > 1_700_000_000
    assert answer == {
        "id": "chatcmpl-some-uuid",
        "object": "chat.completion",
        "model": "llama",
        "choices": [
            {
                "index": index,
                "message": {"role": "assistant", "content": text, "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
            for index, text in enumerate("ab")
        ],
        "usage": OPENAI_USAGE,
    }


def test_a_chat_s_stream_begins_with_the_role_and_ends_with_the_usage() -> None:
    formatter = replies(CHAT, stream=True, stream_options={"include_usage": True})
    body = formatter.chunk([delta(text="a", ids=[5])], None) + formatter.chunk([delta(text="b", ids=[6], **END)], USAGE)
    *chunks, done = events(body)
    assert done == b"data: [DONE]"
    assert {(chunk["id"], chunk["object"], chunk["model"]) for chunk in chunks} == {
        ("chatcmpl-some-uuid", "chat.completion.chunk", "llama")
    }
    assert len({chunk["created"] for chunk in chunks}) == 1
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    assert deltas == [{"role": "assistant", "content": ""}, {"content": "a"}, {"content": "b"}]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [None, None, "stop"]
    assert chunks[-1]["choices"] == []
    assert [chunk["usage"] for chunk in chunks] == [None, None, None, OPENAI_USAGE]


@pytest.mark.parametrize("route", ROUTES)
def test_usage_is_in_a_stream_only_on_request(route: str) -> None:
    *chunks, done = events(replies(route, stream=True).chunk([delta(text="a", ids=[5], **END)], USAGE))
    assert done == b"data: [DONE]"
    assert not any("usage" in chunk for chunk in chunks)


@pytest.mark.parametrize("prompt", ["Hi", "x" * 100_000, "\x00" * 20_000, "é" * 9000])
def test_a_stream_echoes_the_prompt_in_events_of_limited_size(prompt: str) -> None:
    request = parse(COMPLETIONS, prompt=prompt, echo=True, stream=True, n=2)
    formatter = DIALECTS[COMPLETIONS].replies(Accepted("one", request, [[1, 2]]), TOKENIZER, 16)
    body = formatter.chunk([delta(0, "a", [5], **END), delta(1, "b", [6], **END)], USAGE)
    assert max(map(len, body.split(b"\n\n"))) <= MAX_CHUNK_BYTES
    texts = ["", ""]
    for chunk in events(body)[:-1]:
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert texts == [prompt + "a", prompt + "b"]
    assert json.loads(formatter.answer([delta(0, "a", [5], **END)], USAGE))["choices"][0]["text"] == prompt + "a"


def test_a_prompt_of_ids_is_echoed_as_text() -> None:
    ids = TOKENIZER.encode("The quick fox", bos=True)
    formatter = DIALECTS[COMPLETIONS].replies(
        Accepted("one", parse(COMPLETIONS, prompt=ids, echo=True), [ids]), TOKENIZER, 16
    )
    body = formatter.answer([delta(text="a", ids=[5], **END)], USAGE)
    assert json.loads(body)["choices"][0]["text"] == TOKENIZER.decode(ids) + "a"
    assert "quick" in TOKENIZER.decode(ids)


def test_ids_are_where_vllm_has_them() -> None:
    one = [delta(text="a", ids=[5], **END)]
    answer = json.loads(replies(CHAT, [1, 2], return_token_ids=True).answer(one, USAGE))
    assert (answer["prompt_token_ids"], answer["choices"][0]["token_ids"]) == ([1, 2], [5])
    first, second, _ = events(replies(CHAT, [1, 2], return_token_ids=True, stream=True).chunk(one, USAGE))
    assert (first["prompt_token_ids"], second["choices"][0]["token_ids"]) == ([1, 2], [5])
    assert "prompt_token_ids" not in second
    (choice,) = json.loads(replies(COMPLETIONS, [1, 2], return_token_ids=True).answer(one, USAGE))["choices"]
    assert (choice["prompt_token_ids"], choice["token_ids"]) == ([1, 2], [5])
    first, second, _ = events(replies(COMPLETIONS, [1, 2], return_token_ids=True, stream=True).chunk(one, USAGE))
    assert first["choices"][0]["prompt_token_ids"] == [1, 2]
    assert second["choices"][0]["token_ids"] == [5]


@pytest.mark.parametrize("route", ROUTES)
def test_the_ids_of_a_prompt_too_long_for_an_event_are_refused(route: str) -> None:
    longest = replies(route, [2**31] * 5800, return_token_ids=True, stream=True)
    body = longest.chunk([delta(text="a", ids=[5], **END)], USAGE)
    assert max(map(len, body.split(b"\n\n"))) <= MAX_CHUNK_BYTES
    with pytest.raises(ApiError) as caught:
        replies(route, [2**31] * 5801, return_token_ids=True, stream=True)
    assert (caught.value.code, caught.value.param) == ("answer_too_large", "return_token_ids")
    replies(route, [2**31] * 5801, return_token_ids=True)


TWO = [Logprobs(-0.5, ((7, -0.25), (5, -0.5))), Logprobs(-math.inf, ((7, -0.1), (5, -math.inf)))]


def test_a_chat_s_logprobs_are_an_object_per_token() -> None:
    ids = TOKENIZER.encode(" fox é")[-2:]
    body = replies(CHAT, logprobs=True, top_logprobs=2).answer([delta(text="x", ids=ids, logprobs=TWO, **END)], USAGE)
    logprobs = json.loads(body)["choices"][0]["logprobs"]
    assert logprobs["refusal"] is None
    for record, token, one in zip(logprobs["content"], ids, TWO, strict=True):
        raw = TOKENIZER.token_bytes(token)
        assert (bytes(record["bytes"]), record["token"]) == (raw, raw.decode("utf-8", "replace"))
        assert record["logprob"] == max(one.chosen, -9999)
        assert [top["logprob"] for top in record["top_logprobs"]] == [max(value, -9999) for _, value in one.top]
        assert record.keys() - {"top_logprobs"} == record["top_logprobs"][0].keys() == {"token", "logprob", "bytes"}


def test_a_completion_s_logprobs_are_parallel_lists_with_each_token_among_the_most_probable_ones() -> None:
    first, second, other = TOKENIZER.encode("quick fox and")[:3]
    logprobs = [Logprobs(-0.5, ((other, -0.25), (second, -0.75))), Logprobs(-math.inf, ())]
    outputs = [delta(text="quick fox", ids=[first, second], logprobs=logprobs, **END)]
    (choice,) = json.loads(replies(COMPLETIONS, logprobs=2).answer(outputs, USAGE))["choices"]
    names = [TOKENIZER.token_bytes(token).decode() for token in (first, second, other)]
    assert choice["logprobs"] == {
        "tokens": names[:2],
        "token_logprobs": [-0.5, -9999.0],
        "top_logprobs": [{names[0]: -0.5, names[2]: -0.25, names[1]: -0.75}, {names[1]: -9999.0}],
        "text_offset": [0, len(names[0])],
    }


@pytest.mark.parametrize("text", ["The quick fox", "é€🐳 ok", "tab\tand\nline"])
@pytest.mark.parametrize("prompt", ["Hi", ""])
@pytest.mark.parametrize("size", [1, 3, 100])
def test_a_completion_s_offsets_point_to_where_its_tokens_are_in_the_text(text: str, prompt: str, size: int) -> None:
    """The oracle decodes the tokens up to each one in one piece."""
    before = TOKENIZER.encode(prompt, bos=True)
    ids = TOKENIZER.encode(text)
    formatter = replies(COMPLETIONS, before, logprobs=0, stream=True)
    parts = [ids[at : at + size] for at in range(0, len(ids), size)]
    deltas = [delta(text="x", ids=part, logprobs=[Logprobs(-1.0, ())] * len(part)) for part in parts]
    chunks = [event["choices"][0]["logprobs"] for one in deltas for event in events(formatter.chunk([one], None))]
    offsets = [offset for chunk in chunks for offset in chunk["text_offset"]]
    names = [name for chunk in chunks for name in chunk["tokens"]]
    start = len(TOKENIZER.decode(before))
    expected = [len(TOKENIZER.decode(before + ids[:at]).rstrip("\ufffd")) - start for at in range(len(ids))]
    assert offsets == expected
    for name, token in zip(names, ids, strict=True):
        raw = TOKENIZER.token_bytes(token)
        assert name == raw.decode("utf-8", "replace") or name == "bytes:" + "".join(f"\\x{one:02x}" for one in raw)


def scored(ids: list[int]) -> list[Logprobs]:
    """Log probabilities of a prompt's tokens, each with the two most probable ones."""
    return [Logprobs(-float(token), ((7, -0.25), (token, -float(token))), rank=2) for token in ids[1:]]


@pytest.mark.parametrize("size", [1, 2, 64])
def test_an_echoed_prompt_has_log_probabilities_before_those_of_the_answer(size: int) -> None:
    prompt, answer = TOKENIZER.encode("The quick é fox", bos=True), TOKENIZER.encode("lazy dog")
    text = TOKENIZER.decode(prompt + answer)[len(TOKENIZER.decode(prompt)) :]
    full = delta(
        text=text, ids=answer, logprobs=[Logprobs(-1.5, ())] * len(answer), prompt_logprobs=scored(prompt), **END
    )
    (choice,) = json.loads(replies(COMPLETIONS, prompt, echo=True, logprobs=1).answer([full], USAGE))["choices"]
    assert choice["text"] == TOKENIZER.decode(prompt + answer)
    found = choice["logprobs"]
    values = [None, *(max(-float(token), -9999.0) for token in prompt[1:]), *[-1.5] * len(answer)]
    assert found["token_logprobs"] == values
    assert found["top_logprobs"][0] is None
    assert {len(top) for top in found["top_logprobs"][1 : len(prompt)]} == {2}, "the token, and one alternative"
    ids = prompt + answer
    offsets = [len(TOKENIZER.decode(ids[:at]).rstrip("\ufffd")) for at in range(len(ids))]
    assert found["text_offset"] == offsets
    assert found["tokens"][0] == "<s>"
    # The stream adds up to the same.
    formatter = replies(COMPLETIONS, prompt, echo=True, logprobs=1, stream=True)
    formatter.chunk_tokens = size
    *chunks, _ = events(formatter.chunk([full], USAGE))
    assert len(chunks) == 1 + -(-len(prompt) // size)
    parts = [chunk["choices"][0] for chunk in chunks]
    assert "".join(part["text"] for part in parts) == choice["text"]
    for name, all_of_them in found.items():
        assert [one for part in parts for one in part["logprobs"][name]] == all_of_them


def test_an_echo_without_an_answer_is_the_prompt_alone() -> None:
    prompt = TOKENIZER.encode("The quick", bos=True)
    end = delta(ids=[], logprobs=[], prompt_logprobs=scored(prompt), finish_reason=FinishReason.LENGTH)
    fields: dict[str, Any] = {"echo": True, "max_tokens": 0}
    (choice,) = json.loads(replies(COMPLETIONS, prompt, logprobs=0, **fields).answer([end], USAGE))["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("The quick", "length")
    assert len(choice["logprobs"]["tokens"]) == len(prompt)
    plain = delta(prompt_logprobs=scored(prompt), finish_reason=FinishReason.LENGTH)
    (choice,) = json.loads(replies(COMPLETIONS, prompt, **fields).answer([plain], USAGE))["choices"]
    assert (choice["text"], choice["logprobs"]) == ("Hi", None), "as it was sent"


@pytest.mark.parametrize("route", ROUTES)
def test_the_log_probabilities_of_a_prompt_are_where_vllm_has_them(route: str) -> None:
    prompt = TOKENIZER.encode("The quick", bos=True)
    end = delta(text="a", ids=[5], prompt_logprobs=scored(prompt), **END)
    answer = json.loads(replies(route, prompt, prompt_logprobs=1).answer([end], USAGE))
    holder = answer if route == CHAT else answer["choices"][0]
    first, *others = holder["prompt_logprobs"]
    assert first is None
    for token, record in zip(prompt[1:], others, strict=True):
        assert record == {
            str(token): {"logprob": -float(token), "rank": 2, "decoded_token": TOKENIZER.token_bytes(token).decode()},
            "7": {"logprob": -0.25, "rank": 1, "decoded_token": TOKENIZER.token_bytes(7).decode("utf-8", "replace")},
        }
    assert "prompt_logprobs" not in answer if route == COMPLETIONS else "prompt_logprobs" not in answer["choices"][0]
    without = json.loads(replies(route, prompt).answer([delta(text="a", ids=[5], **END)], USAGE))
    assert "prompt_logprobs" not in json.dumps(without)


def test_the_choices_of_several_prompts_are_numbered_prompt_by_prompt() -> None:
    request = parse(COMPLETIONS, prompt=["The", "quick", "fox"], n=2, echo=True, return_token_ids=True)
    prompts = [TOKENIZER.encode(text, bos=True) for text in request.prompts]
    outputs = [delta(index, "!", [5], **END) for index in range(6)]
    formatter = DIALECTS[COMPLETIONS].replies(Accepted("one", request, prompts), TOKENIZER, 16)
    choices = json.loads(formatter.answer(outputs, USAGE))["choices"]
    assert [choice["index"] for choice in choices] == list(range(6))
    assert [choice["text"] for choice in choices] == ["The!", "The!", "quick!", "quick!", "fox!", "fox!"]
    assert [choice["prompt_token_ids"] for choice in choices] == [prompts[index // 2] for index in range(6)]
    # In a stream, each begins when its own first token is there.
    formatter = DIALECTS[COMPLETIONS].replies(Accepted("one", request, prompts), TOKENIZER, 16)
    late, *early = outputs
    chunks = events(formatter.chunk(early, None)) + events(formatter.chunk([late], USAGE))[:-1]
    texts = [""] * 6
    for chunk in chunks:
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["text"]
    assert texts == [choice["text"] for choice in choices]


@pytest.mark.parametrize("route", ROUTES)
def test_tokens_may_be_written_as_ids(route: str) -> None:
    fields: dict[str, Any] = {"logprobs": 1} if route == COMPLETIONS else {"logprobs": True, "top_logprobs": 1}
    output = delta(text="a", ids=[5], logprobs=[Logprobs(-0.5, ((7, -0.25),))], **END)
    formatter = replies(route, return_tokens_as_token_ids=True, **fields)
    logprobs = json.loads(formatter.answer([output], USAGE))["choices"][0]["logprobs"]
    if route == COMPLETIONS:
        assert logprobs["tokens"] == ["token_id:5"]
        assert logprobs["top_logprobs"] == [{"token_id:5": -0.5, "token_id:7": -0.25}]
    else:
        (record,) = logprobs["content"]
        assert (record["token"], record["top_logprobs"][0]["token"]) == ("token_id:5", "token_id:7")
        assert bytes(record["bytes"]) == TOKENIZER.token_bytes(5)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("include_usage", [True, False])
def test_usage_is_in_every_event_on_request(route: str, include_usage: bool) -> None:
    options = {"include_usage": include_usage, "continuous_usage_stats": True}
    formatter = replies(route, [1, 2, 3], stream=True, stream_options=options, return_token_ids=True)
    body = formatter.chunk([delta(text="a", ids=[5])], None) + formatter.chunk([delta(text="b", ids=[6], **END)], USAGE)
    *chunks, done = events(body)
    assert done == b"data: [DONE]"
    totals = [chunk["usage"] for chunk in chunks if chunk["choices"]]
    assert [one["completion_tokens"] for one in totals][-2:] == [1, 2]
    assert {one["prompt_tokens"] for one in totals} == {3}
    assert all(one["total_tokens"] == 3 + one["completion_tokens"] for one in totals)
    assert (chunks[-1]["choices"] == []) is include_usage
    assert (chunks[-1]["usage"] == OPENAI_USAGE) is include_usage


@pytest.mark.parametrize("text", ["x", "\x00"])
def test_a_message_of_a_stream_that_would_end_the_worker_is_refused(text: str) -> None:
    longest = 6 * 2**20 // len(json.dumps(text).strip('"'))
    request = parse(COMPLETIONS, prompt=text * longest, echo=True, stream=True)
    formatter = DIALECTS[COMPLETIONS].replies(Accepted("one", request, [[1, 2]]), TOKENIZER, 16)
    with pytest.raises(ApiError) as caught:
        formatter.chunk([delta(text="a", ids=[5])], None)
    assert caught.value.code == "answer_too_large"
    assert json.loads(formatter.error(caught.value)), "nothing of the stream has been sent"


@pytest.mark.parametrize("route", ROUTES)
def test_an_error_is_an_object_before_the_stream_and_an_event_in_it(route: str) -> None:
    error = ApiError(500, "nan_logits", "bad")
    formatter = replies(route, stream=True)
    assert json.loads(formatter.error(error)) == {"error": error.fields()}
    formatter.chunk([delta(text="a", ids=[5])], None)
    assert events(formatter.error(error)) == [{"error": error.fields()}, b"data: [DONE]"]


@pytest.mark.parametrize("route", ROUTES)
def test_one_failed_output_fails_the_request(route: str) -> None:
    """OpenAI has no finish_reason for it, and clients read a choice without an error as an answer."""
    error = ApiError(500, "nan_logits", "bad")
    outputs = [delta(0, "a", [5], **END), delta(1, finish_reason=FinishReason.ERROR, error=error)]
    with pytest.raises(ApiError) as caught:
        replies(route, n=2).answer(outputs, USAGE)
    assert caught.value is error
    with pytest.raises(ApiError) as caught:
        (formatter := replies(route, n=2, stream=True)).chunk(outputs, None)
    assert caught.value is error
    assert json.loads(formatter.error(error)) == {"error": error.fields()}, "nothing of the stream has been sent"


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("byte", [b"\x00", b"\xff", b'"', b"a"])
@pytest.mark.parametrize(("top", "longest"), [(None, 128), (0, 128), (20, 128), (20, 48), (5, 256)])
def test_no_event_exceeds_the_limit_whatever_the_tokens(route: str, byte: bytes, top: int | None, longest: int) -> None:
    fields: dict[str, Any] = {"stream": True, "return_token_ids": True}
    if top is not None:
        fields |= {"logprobs": top} if route == COMPLETIONS else {"logprobs": True, "top_logprobs": top}

    class Words:
        drops_leading_space = False
        special_ids: ClassVar[dict[str, int]] = {}

        @staticmethod
        def token_bytes(_: int) -> bytes:
            return byte * longest

    request = parse(route, **fields)
    formatter = DIALECTS[route].replies(Accepted("x" * 36, request, [[1]]), Words, longest)
    count = formatter.chunk_tokens
    assert 1 <= count <= MAX_CHUNK_TOKENS
    value = -1.2345678901234567e-300
    logprobs = None if top is None else [Logprobs(value, tuple((one, value) for one in range(top)))] * count
    text = (byte * longest).decode("utf-8", "replace") * count + "\x00" * 256
    full = delta(text=text, ids=[10**6] * count, logprobs=logprobs, finish_reason=FinishReason.LENGTH)
    assert max(map(len, formatter.chunk([full], USAGE).split(b"\n\n"))) <= MAX_CHUNK_BYTES - 2


def test_the_model_is_described() -> None:
    documents = {route: json.loads(document.body) for route, document in model_documents(("llama",), 2048).items()}
    assert documents["v1/models"] == {"object": "list", "data": [documents["v1/models/llama"]]}
    model = documents["v1/models/llama"]
    assert (model["id"], model["object"], model["max_model_len"]) == ("llama", "model", 2048)
