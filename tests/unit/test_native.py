"""The dialect of /predictions/llama."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_tp.engine.request import FinishReason, Logprobs
from llama_tp.engine.sampling_params import KNOBS, SamplingParams
from llama_tp.serving.dialects import native
from llama_tp.serving.dialects.native import NativeReplies, parse_native, token_logprobs
from llama_tp.serving.errors import ApiError
from llama_tp.serving.generation import GenerationRequest, Mode, OutputDelta, RequestDefaults, Usage
from llama_tp.serving.reply_size import MAX_ANSWER_BYTES, MAX_CHUNK_BYTES, MAX_CHUNK_TOKENS, chunk_tokens
from llama_tp.text.dialog import Message


def defaults(mode: Mode, **sampling: float) -> RequestDefaults:
    every = {knob.name: knob.default for knob in KNOBS} | {"temperature": 0.6, "top_p": 0.9, "top_k": 7} | sampling
    return RequestDefaults(mode=mode, max_new_tokens=100, seed=42, sampling=every)


DEFAULTS = defaults("text_completion", min_p=0.01)
CHAT_DEFAULTS = defaults("chat")
HI = [{"role": "user", "content": "Hi"}]
OPTIONAL = (
    *("mode", "max_new_tokens", "min_new_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty"),
    *("presence_penalty", "frequency_penalty", "logit_bias", "seed", "stop", "stop_token_ids", "ignore_eos"),
    *("logprobs", "top_logprobs", "prompt_logprobs", "n", "timeout_s", "stream", "continue_final_message"),
    *("response_format", "structured_outputs"),
)


def parse(defaults: RequestDefaults = DEFAULTS, **fields: Any) -> GenerationRequest:
    return parse_native(json.dumps(fields).encode(), defaults)


def refusal(body: object, defaults: RequestDefaults = DEFAULTS) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse_native(body, defaults)
    assert json.loads(caught.value.body().decode())["error"]["code"] == caught.value.code
    return caught.value


def test_the_originals_sample_text_is_a_completion() -> None:
    body = b'{"prompt": "what is the recipe of mayonnaise?", "max_new_tokens": 50}\n'
    assert parse_native(body, CHAT_DEFAULTS) == GenerationRequest(
        prompts=("what is the recipe of mayonnaise?",),
        sampling=SamplingParams(max_new_tokens=50, temperature=0.6, top_p=0.9, top_k=7, seed=42),
        max_new_tokens_explicit=True,
    )


def test_the_originals_sample_dialog_is_a_chat() -> None:
    dialog = [{"role": "system", "content": "Be brief."}, *HI]
    request = parse(dialog=dialog, max_new_tokens=50, mode="chat")
    assert request.prompts == ()
    assert request.dialog == (Message("system", "Be brief."), Message("user", "Hi"))


KNOB_VALUES = {
    "temperature": 0,
    "top_p": 1,
    "top_k": 0,
    "min_p": 1,
    "repetition_penalty": 1.1,
    "presence_penalty": -2,
    "frequency_penalty": 2,
}


def test_every_sampling_knob_is_a_field() -> None:
    assert [knob.name for knob in KNOBS] == list(KNOB_VALUES)


def test_what_a_request_says_goes_before_the_defaults() -> None:
    sampling: dict[str, Any] = {**KNOB_VALUES, "max_new_tokens": 1, "min_new_tokens": 1, "seed": 0, "n": 16}
    others: dict[str, Any] = {"ignore_eos": True, "timeout_s": 0.5, "stream": True}
    request = parse(prompt="x", stop=["a", "b"], **sampling, **others)
    assert {name: getattr(request.sampling, name) for name in sampling} == sampling
    assert {name: getattr(request, name) for name in others} == others
    assert request.stop == ("a", "b")
    assert request.max_new_tokens_explicit


def test_only_a_dialog_has_a_final_message_to_continue() -> None:
    begun = [*HI, {"role": "assistant", "content": "Well"}]
    assert parse(dialog=begun, continue_final_message=True).continues_text
    assert not parse(dialog=begun).continues_text
    assert parse(prompt="x").continues_text
    with pytest.raises(ApiError) as caught:
        parse(prompt="x", continue_final_message=True)
    assert (caught.value.code, caught.value.param) == ("conflicting_fields", "continue_final_message")
    assert "needs a dialog" in caught.value.message


def test_what_a_request_leaves_open_is_the_defaults() -> None:
    request = parse(prompt="x")
    assert {knob.name: getattr(request.sampling, knob.name) for knob in KNOBS} == DEFAULTS.sampling
    assert (request.sampling.max_new_tokens, request.sampling.seed) == (DEFAULTS.max_new_tokens, DEFAULTS.seed)
    assert (request.stop, request.stream, request.max_new_tokens_explicit) == ((), False, False)


@pytest.mark.parametrize(
    ("fields", "logprobs"),
    [
        ({}, None),
        ({"logprobs": False}, None),
        ({"logprobs": True}, 0),
        ({"logprobs": True, "top_logprobs": 0}, 0),
        ({"logprobs": True, "top_logprobs": 20}, 20),
    ],
)
def test_logprobs_are_reported_where_asked_for(fields: dict[str, Any], logprobs: int | None) -> None:
    assert parse(prompt="x", **fields).sampling.logprobs == logprobs


def test_a_bias_is_by_token_id() -> None:
    assert parse(prompt="x", logit_bias={"0": -100, "31999": 0.5}).sampling.logit_bias == {0: -100.0, 31999: 0.5}


def test_min_new_tokens_may_be_max_new_tokens_and_raises_a_default() -> None:
    assert parse(prompt="x", min_new_tokens=7, max_new_tokens=7).sampling.max_new_tokens == 7
    raised = parse(prompt="x", min_new_tokens=DEFAULTS.max_new_tokens + 1)
    assert (raised.sampling.max_new_tokens, raised.max_new_tokens_explicit) == (DEFAULTS.max_new_tokens + 1, False)
    assert parse(prompt="x", min_new_tokens=1).sampling.max_new_tokens == DEFAULTS.max_new_tokens


def test_fields_that_contradict_each_other_are_both_named() -> None:
    error = refusal({"prompt": "x", "min_new_tokens": 6, "max_new_tokens": 5})
    assert error.message == "min_new_tokens=6 must be at most max_new_tokens=5"
    assert "logprobs=true" in refusal({"prompt": "x", "top_logprobs": 5}).message


def test_saying_the_default_length_makes_it_explicit() -> None:
    assert parse(prompt="x", max_new_tokens=DEFAULTS.max_new_tokens).max_new_tokens_explicit


@pytest.mark.parametrize("name", OPTIONAL)
def test_null_means_that_a_field_is_not_given(name: str) -> None:
    assert parse(prompt="x", **{name: None}) == parse(prompt="x")


def test_of_prompt_and_dialog_the_one_that_is_null_is_not_given() -> None:
    assert parse(prompt=None, dialog=HI) == parse(dialog=HI)
    assert parse(prompt="x", dialog=None) == parse(prompt="x")
    assert refusal({"prompt": None, "dialog": None}).message.startswith("prompt must not be null")


def test_a_prompt_may_be_token_ids() -> None:
    assert parse(prompt=[0, 5, 31999]).prompts == ((0, 5, 31999),)


@pytest.mark.parametrize("prompt", [" ", "\n", "\0", "</s><|eot_id|>", "x" * 900_000, "CUDA\n[METRICS]a:1|#:"])
def test_any_text_but_none_is_a_prompt(prompt: str) -> None:
    assert parse(prompt=prompt).prompts == (prompt,)


def test_the_body_may_be_parsed_already() -> None:
    assert parse_native({"prompt": "x", "stop": "a"}, DEFAULTS) == parse(prompt="x", stop="a")


@pytest.mark.parametrize("defaults", [DEFAULTS, CHAT_DEFAULTS])
@pytest.mark.parametrize(
    ("fields", "mode"),
    [
        ({"prompt": "x"}, "text_completion"),
        ({"dialog": HI}, "chat"),
        ({"prompt": "x", "mode": "text_completion"}, "text_completion"),
        ({"dialog": HI, "mode": "chat"}, "chat"),
    ],
)
def test_the_field_that_is_there_decides_the_mode(fields: dict[str, Any], mode: str, defaults: RequestDefaults) -> None:
    assert (parse(defaults, **fields).dialog is not None) == (mode == "chat")


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({}, "missing_field", "prompt"),
        ({"max_new_tokens": 5}, "missing_field", "prompt"),
        ({"mode": "text_completion"}, "missing_field", "prompt"),
        ({"mode": "chat"}, "missing_field", "dialog"),
        ({"prompt": "x", "dialog": HI}, "conflicting_fields", "dialog"),
        ({"prompt": "x", "dialog": HI, "mode": "chat"}, "conflicting_fields", "dialog"),
        ({"prompt": "x", "mode": "chat"}, "conflicting_fields", "mode"),
        ({"dialog": HI, "mode": "text_completion"}, "conflicting_fields", "mode"),
        ({"prompt": "x", "mode": "Chat"}, "invalid_value", "mode"),
        ({"prompt": "x", "mode": ""}, "invalid_value", "mode"),
        ({"prompt": "x", "mode": ["chat"]}, "invalid_type", "mode"),
        ({"prompt": "x", "max_tokens": 5}, "unknown_field", "max_tokens"),
        ({"prompt": "x", "max_new_token": 5}, "unknown_field", "max_new_token"),
        ({"prompt": "x", "model_fields": 5}, "unknown_field", "model_fields"),
        ({"messages": HI}, "unknown_field", "messages"),
        ({"Prompt": "x"}, "unknown_field", "Prompt"),
        ({"prompt": ""}, "empty_prompt", "prompt"),
        ({"prompt": []}, "empty_prompt", "prompt"),
        ({"prompt": 5}, "invalid_type", "prompt"),
        ({"prompt": 0}, "invalid_type", "prompt"),
        ({"prompt": False}, "invalid_type", "prompt"),
        ({"prompt": None}, "invalid_type", "prompt"),
        ({"prompt": {}}, "invalid_type", "prompt"),
        ({"prompt": {"text": "x"}}, "invalid_type", "prompt"),
        ({"prompt": ["x"]}, "invalid_type", "prompt[0]"),
        ({"prompt": [1, 2.0]}, "invalid_type", "prompt[1]"),
        ({"prompt": [1, True]}, "invalid_type", "prompt[1]"),
        ({"prompt": [[1]]}, "invalid_type", "prompt[0]"),
        ({"prompt": [1, None]}, "invalid_type", "prompt[1]"),
        ({"prompt": [1, 2, -1]}, "token_out_of_range", "prompt[2]"),
        ({"prompt": "x\ud800"}, "invalid_unicode", "prompt"),
        ({"dialog": None}, "invalid_type", "dialog"),
        ({"dialog": []}, "empty_messages", "dialog"),
        ({"dialog": {}}, "invalid_type", "dialog"),
        ({"dialog": "Hi"}, "invalid_type", "dialog"),
        ({"dialog": HI[0]}, "invalid_type", "dialog"),
        ({"dialog": [123]}, "invalid_type", "dialog[0]"),
        ({"dialog": [*HI, None]}, "invalid_type", "dialog[1]"),
        ({"dialog": [HI]}, "invalid_type", "dialog[0]"),
        ({"dialog": [{}]}, "invalid_type", "dialog[0].role"),
        ({"dialog": [{"role": "user"}]}, "invalid_type", "dialog[0].content"),
        ({"dialog": [{"role": "user", "content": None}]}, "invalid_type", "dialog[0].content"),
        ({"dialog": [*HI, {"role": "user", "content": 5}]}, "invalid_type", "dialog[1].content"),
        ({"dialog": [{"role": "user", "content": [{"type": "text"}]}]}, "invalid_type", "dialog[0].content"),
        ({"dialog": [{"role": 5, "content": "Hi"}]}, "invalid_type", "dialog[0].role"),
        ({"dialog": [{"role": None, "content": "Hi"}]}, "invalid_type", "dialog[0].role"),
        ({"dialog": [{"content": "Hi"}]}, "invalid_type", "dialog[0].role"),
        ({"dialog": [{**HI[0], "contents": "Hi"}]}, "unknown_field", "dialog[0].contents"),
        ({"dialog": [{"role": "user", "content": "\udc00"}]}, "invalid_unicode", "dialog[0].content"),
        ({"prompt": "x", "max_new_tokens": 0}, "invalid_value", "max_new_tokens"),
        ({"prompt": "x", "max_new_tokens": -1}, "invalid_value", "max_new_tokens"),
        ({"prompt": "x", "max_new_tokens": -1, "prompt_logprobs": 0}, "invalid_value", "max_new_tokens"),
        ({"prompt": "x", "prompt_logprobs": 21}, "invalid_value", "prompt_logprobs"),
        ({"prompt": "x", "prompt_logprobs": True}, "invalid_type", "prompt_logprobs"),
        ({"prompt": "x", "prompt_logprobs": 0, "stream": True}, "conflicting_fields", "prompt_logprobs"),
        ({"prompt": "x", "max_new_tokens": 10**9}, "invalid_value", "max_new_tokens"),
        ({"prompt": "x", "max_new_tokens": 1e9}, "invalid_value", "max_new_tokens"),
        ({"prompt": "x", "max_new_tokens": 2**31 + 1}, "invalid_value", "max_new_tokens"),
        ({"prompt": "x", "max_new_tokens": "5"}, "invalid_type", "max_new_tokens"),
        ({"prompt": "x", "max_new_tokens": 5.5}, "invalid_type", "max_new_tokens"),
        ({"prompt": "x", "max_new_tokens": 5.0}, "invalid_type", "max_new_tokens"),
        ({"prompt": "x", "max_new_tokens": True}, "invalid_type", "max_new_tokens"),
        ({"prompt": "x", "temperature": -1}, "invalid_value", "temperature"),
        ({"prompt": "x", "temperature": 2.1}, "invalid_value", "temperature"),
        ({"prompt": "x", "temperature": "hot"}, "invalid_type", "temperature"),
        ({"prompt": "x", "temperature": True}, "invalid_type", "temperature"),
        ({"prompt": "x", "top_p": 0}, "invalid_value", "top_p"),
        ({"prompt": "x", "top_p": 1.1}, "invalid_value", "top_p"),
        ({"prompt": "x", "top_p": True}, "invalid_type", "top_p"),
        ({"prompt": "x", "top_k": -2}, "invalid_value", "top_k"),
        ({"prompt": "x", "top_k": 1.5}, "invalid_type", "top_k"),
        ({"prompt": "x", "min_p": 2}, "invalid_value", "min_p"),
        ({"prompt": "x", "seed": 2**64}, "invalid_value", "seed"),
        ({"prompt": "x", "seed": -1}, "invalid_value", "seed"),
        ({"prompt": "x", "seed": 1.5}, "invalid_type", "seed"),
        ({"prompt": "x", "seed": False}, "invalid_type", "seed"),
        ({"prompt": "x", "stop": ""}, "invalid_value", "stop"),
        ({"prompt": "x", "stop": [""]}, "invalid_value", "stop[0]"),
        ({"prompt": "x", "stop": [1]}, "invalid_type", "stop[0]"),
        ({"prompt": "x", "stop": list("abcde")}, "too_many_stops", "stop"),
        ({"prompt": "x", "stop": "a" * 10_000}, "invalid_value", "stop"),
        ({"prompt": "x", "stop": 5}, "invalid_type", "stop"),
        ({"prompt": "x", "min_new_tokens": -1}, "invalid_value", "min_new_tokens"),
        ({"prompt": "x", "min_new_tokens": 1e9}, "invalid_value", "min_new_tokens"),
        ({"prompt": "x", "min_new_tokens": 2.0}, "invalid_type", "min_new_tokens"),
        ({"prompt": "x", "min_new_tokens": 6, "max_new_tokens": 5}, "invalid_value", "min_new_tokens"),
        ({"prompt": "x", "repetition_penalty": 0}, "invalid_value", "repetition_penalty"),
        ({"prompt": "x", "repetition_penalty": 10.1}, "invalid_value", "repetition_penalty"),
        ({"prompt": "x", "presence_penalty": -2.1}, "invalid_value", "presence_penalty"),
        ({"prompt": "x", "presence_penalty": "1"}, "invalid_type", "presence_penalty"),
        ({"prompt": "x", "frequency_penalty": 2.1}, "invalid_value", "frequency_penalty"),
        ({"prompt": "x", "frequency_penalty": True}, "invalid_type", "frequency_penalty"),
        ({"prompt": "x", "logit_bias": [[5, 1]]}, "invalid_type", "logit_bias"),
        ({"prompt": "x", "logit_bias": {"fox": 1}}, "invalid_value", "logit_bias.fox"),
        ({"prompt": "x", "logit_bias": {"7": True}}, "invalid_type", "logit_bias.7"),
        ({"prompt": "x", "stop_token_ids": 5}, "invalid_type", "stop_token_ids"),
        ({"prompt": "x", "stop_token_ids": [1, "2"]}, "invalid_type", "stop_token_ids[1]"),
        ({"prompt": "x", "stop_token_ids": [-1]}, "token_out_of_range", "stop_token_ids[0]"),
        ({"prompt": "x", "stop_token_ids": [5] * 65}, "invalid_value", "stop_token_ids"),
        ({"prompt": "x", "ignore_eos": 1}, "invalid_type", "ignore_eos"),
        ({"prompt": "x", "logprobs": 5}, "invalid_type", "logprobs"),
        ({"prompt": "x", "top_logprobs": 5}, "conflicting_fields", "top_logprobs"),
        ({"prompt": "x", "top_logprobs": 0, "logprobs": False}, "conflicting_fields", "top_logprobs"),
        ({"prompt": "x", "top_logprobs": 21, "logprobs": True}, "invalid_value", "top_logprobs"),
        ({"prompt": "x", "n": 0}, "invalid_value", "n"),
        ({"prompt": "x", "n": 17}, "invalid_value", "n"),
        ({"prompt": "x", "timeout_s": 0}, "invalid_value", "timeout_s"),
        ({"prompt": "x", "timeout_s": 3601}, "invalid_value", "timeout_s"),
        ({"prompt": "x", "stream": 1}, "invalid_type", "stream"),
        ({"prompt": "x", "stream": "true"}, "invalid_type", "stream"),
    ],
)
def test_a_bad_request_is_refused_with_code_and_param(fields: dict[str, Any], code: str, param: str) -> None:
    error = refusal(json.dumps(fields).encode())
    assert (error.status, error.code, error.param) == (400, code, param)
    assert refusal(fields).body() == error.body(), "parsed by TorchServe or by us, the answer is the same"


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "invalid_json"),
        (b"Hello", "invalid_json"),
        (b"[]", "not_an_object"),
        (b'{"prompt": ' + b"[" * 100_000, "too_deep"),
        (b'{"prompt": "a", "prompt": "b"}', "duplicate_key"),
        (b'{"prompt": "a", "temperature": NaN}', "invalid_json"),
        (b'{"prompt": "a", "temperature": 1e999}', "invalid_value"),
        (b'{"prompt": "a", "seed": ' + b"1" * 5000 + b"}", "invalid_value"),
    ],
)
def test_a_body_that_is_no_strict_json_is_refused(body: bytes, code: str) -> None:
    assert refusal(body).code == code


def test_an_openai_users_max_tokens_is_answered_with_our_name_for_it() -> None:
    assert "did you mean max_new_tokens?" in refusal({"prompt": "x", "max_tokens": 5}).message


@pytest.mark.parametrize(
    "fields", [{"messages": HI}, {"model": "llama", "messages": HI}, {"messages": None, "prompt": "x"}]
)
def test_an_openai_users_messages_are_answered_with_the_hint_at_dialog(fields: dict[str, Any]) -> None:
    error = refusal(fields)
    assert (error.code, error.param) == ("unknown_field", next(iter(fields)))
    assert "send the messages as dialog" in error.message


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("max_completion_tokens", "max_new_tokens"),
        ("inputs", "prompt"),
        ("system", "dialog"),
        ("num_beams", "the fields"),
    ],
)
def test_a_field_of_another_api_is_answered_with_what_to_send_here(name: str, meant: str) -> None:
    assert meant in refusal({"prompt": "x", name: 1}).message


def test_values_are_repeated_as_json_writes_them() -> None:
    assert refusal({"prompt": "x", "temperature": True}).message == "temperature=true must be a number"
    assert refusal({"prompt": "x", "mode": "poem"}).message == 'mode="poem" must be "text_completion" or "chat"'
    assert refusal({"prompt": "x", "mode": "chat"}).message.startswith('mode="chat" contradicts prompt')


def test_without_prompt_and_dialog_the_configured_mode_says_what_is_missing() -> None:
    assert refusal({}, CHAT_DEFAULTS).param == "dialog"


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": {"CUDA\n[METRICS]": 1}},
        {"CUDA\n[METRICS]a.Counter:1|#Level:Host\n[PID]1": 1},
        {"prompt": "x", "mode": "\nTorch worker started.\n"},
        {"dialog": [{"role": "user", "content": "x", "\n[PID]1\r": 1}]},
        {"prompt": "x", "stop": "\n" * 300},
    ],
)
def test_hostile_text_is_answered_inside_one_json_string(fields: dict[str, Any]) -> None:
    body = refusal(fields).body()
    assert len(body.splitlines()) == 1


def delta(
    text: str = "", ids: Sequence[int] = (), finish_reason: FinishReason | None = None, **others: Any
) -> OutputDelta:
    fields = {"index": 0, "logprobs": None, "error": None, **others}
    return OutputDelta(text=text, ids=ids, finish_reason=finish_reason, **fields)


WORDS = {5: b" fox", 6: "é".encode()[:1], 7: b""}


def replies(**fields: Any) -> NativeReplies:
    return NativeReplies(parse(prompt="x", **fields), [1], WORDS.__getitem__, 16)


ONE, TWO = replies(), replies(n=2)
USAGE = Usage(5, 2)
USAGE_FIELDS = {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}
FAILED = ApiError(500, "nan_logits", "not finite")


def test_an_answer_is_one_object_on_one_line() -> None:
    reply = ONE.answer([delta("Grüße\n😀", (1, 2), FinishReason.STOP)], USAGE)
    assert reply.endswith(b"}\n")
    assert reply.count(b"\n") == 1
    assert "Grüße\\n😀".encode() in reply
    assert json.loads(reply) == {"text": "Grüße\n😀", "finish_reason": "stop", "usage": USAGE_FIELDS}


def test_a_stream_is_lines_of_json_and_the_last_says_why_it_ended() -> None:
    stream = ONE.chunk([delta("a\n", (1,))]) + ONE.chunk([delta()])
    stream += ONE.chunk([delta("b", [2], FinishReason.LENGTH)], USAGE)
    assert [json.loads(line) for line in stream.splitlines()] == [
        {"text": "a\n", "ids": [1]},
        {"text": "", "ids": []},
        {"text": "b", "ids": [2], "finish_reason": "length", "usage": USAGE_FIELDS},
    ]


def test_an_answer_of_several_outputs_is_a_list_of_choices() -> None:
    deltas = [delta("a", (1,), FinishReason.STOP), delta("", (), FinishReason.ERROR, index=1, error=FAILED)]
    assert json.loads(TWO.answer(deltas, USAGE)) == {
        "choices": [
            {"index": 0, "text": "a", "finish_reason": "stop"},
            {"index": 1, "text": "", "finish_reason": "error", "error": FAILED.fields()},
        ],
        "usage": USAGE_FIELDS,
    }


def test_the_usage_of_several_outputs_is_in_the_last_of_all_lines() -> None:
    deltas = [delta("a", (1,), FinishReason.STOP, index=1), delta("b", (2,), FinishReason.STOP, index=0)]
    stream = TWO.chunk(deltas, USAGE)
    assert [json.loads(line) for line in stream.splitlines()] == [
        {"index": 1, "text": "a", "ids": [1], "finish_reason": "stop"},
        {"index": 0, "text": "b", "ids": [2], "finish_reason": "stop", "usage": USAGE_FIELDS},
    ]


def test_logprobs_have_the_names_of_openai_s_and_no_infinity() -> None:
    logprobs = Logprobs(-0.5, ((5, -0.5), (6, -2.0), (7, float("-inf"))))
    record = token_logprobs(5, logprobs, WORDS.__getitem__)
    assert record == {
        "id": 5,
        "token": " fox",
        "bytes": [32, 102, 111, 120],
        "logprob": -0.5,
        "top_logprobs": [
            {"id": 5, "token": " fox", "bytes": [32, 102, 111, 120], "logprob": -0.5},
            {"id": 6, "token": "\ufffd", "bytes": [0xC3], "logprob": -2.0},
            {"id": 7, "token": "", "bytes": [], "logprob": -9999.0},
        ],
    }
    assert json.loads(ONE.answer([delta("a", (5,), FinishReason.STOP, logprobs=[logprobs])], USAGE))["logprobs"] == [
        record
    ]
    assert json.loads(ONE.chunk([delta("a", (5,), logprobs=[logprobs])]))["logprobs"] == [record]


@pytest.mark.parametrize("longest", [1, 16, 128])
@pytest.mark.parametrize("fields", [{}, {"logprobs": True}, {"logprobs": True, "top_logprobs": 20}], ids=str)
@pytest.mark.parametrize("byte", [b"\0", b"\xff", b'"'])
def test_a_chunk_of_the_largest_tokens_fits_into_a_line(fields: dict[str, Any], longest: int, byte: bytes) -> None:
    request = parse(prompt="x", stream=True, n=2, **fields)
    formatter = NativeReplies(request, [1], lambda _: byte * longest, longest)
    count = formatter.chunk_tokens
    assert 1 <= count <= MAX_CHUNK_TOKENS
    logprob = -1.2345678901234567e-05
    logprobs = Logprobs(logprob, ((2**17, logprob),) * (request.sampling.logprobs or 0))
    text = (byte * longest * count).decode("utf-8", "replace") + "\0" * 256
    each = None if request.sampling.logprobs is None else [logprobs] * count
    line = delta(text, [2**17] * count, FinishReason.LENGTH, index=15, logprobs=each)
    assert len(formatter.chunk([line], Usage(2**17, 2**17))) <= MAX_CHUNK_BYTES


def test_plain_chunks_hold_64_tokens() -> None:
    assert chunk_tokens(parse(prompt="x", stream=True), 128) == MAX_CHUNK_TOKENS == 64


def test_an_answer_over_the_limit_is_refused_with_the_remedy() -> None:
    with pytest.raises(ApiError) as caught:
        ONE.answer([delta("x" * MAX_ANSWER_BYTES, (1,), FinishReason.LENGTH)], USAGE)
    assert (caught.value.status, caught.value.code, caught.value.param) == (400, "answer_too_large", "stream")


def test_a_stream_that_fails_says_so_in_its_last_line() -> None:
    line = ONE.error(ApiError(500, "nan_logits", "the model produced numbers that are not finite"))
    assert line.endswith(b"\n")
    assert json.loads(line)["error"]["type"] == "server_error"


def test_replies_are_valid_utf8_even_for_text_that_is_not() -> None:
    for reply in (ONE.answer([delta("\ud800", (), FinishReason.STOP)], USAGE), ONE.chunk([delta("\udfff", (1,))])):
        assert json.loads(reply.decode())["text"] == "?"


def test_a_chunk_over_the_limit_is_a_broken_promise() -> None:
    frame = len(ONE.chunk([delta("", (1,))]))
    assert len(ONE.chunk([delta("x" * (MAX_CHUNK_BYTES - frame), (1,))])) == MAX_CHUNK_BYTES
    with pytest.raises(AssertionError):
        ONE.chunk([delta("é" * ((MAX_CHUNK_BYTES - frame) // 2 + 1), (1,))])


FIELDS = ("prompt", "dialog", "mode", "max_new_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop")
FIELDS += ("min_new_tokens", "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "n")
FIELDS += ("stop_token_ids", "ignore_eos", "logprobs", "top_logprobs", "timeout_s")
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8)
json_values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
messages = st.dictionaries(st.sampled_from(["role", "content", "name"]), json_values, max_size=3)
likely = {
    "prompt": st.text(min_size=1) | st.lists(st.integers(-1, 9)),
    "dialog": st.lists(messages | st.just(HI[0]), max_size=3),
    "max_new_tokens": st.integers(-1, 2**32),
    "min_new_tokens": st.integers(-1, 200),
    "repetition_penalty": st.floats(0, 11),
    "logit_bias": st.dictionaries(st.text("0123456789-x", max_size=3), st.floats(-101, 101), max_size=3),
    "stop_token_ids": st.lists(st.integers(-1, 9), max_size=3),
    "logprobs": st.booleans(),
    "top_logprobs": st.integers(0, 21),
    "n": st.integers(0, 17),
    "temperature": st.floats(-0.1, 2.1),
    "stop": st.lists(st.text(max_size=3), max_size=5) | st.text(max_size=3),
}
near_requests = st.dictionaries(st.sampled_from([*FIELDS, "x"]), json_values, max_size=4) | st.fixed_dictionaries(
    {}, optional=likely
)


def outcome(body: object) -> GenerationRequest | ApiError:
    try:
        return parse_native(body, DEFAULTS)
    except ApiError as error:
        return error


@settings(max_examples=400, deadline=None)
@given(
    st.binary()
    | st.text(st.characters())
    | json_values
    | json_values.map(json.dumps)
    | near_requests
    | near_requests.map(lambda value: json.dumps(value).encode())
)
def test_anything_is_a_request_or_refused_with_400(body: object) -> None:
    result = outcome(body)
    if isinstance(result, ApiError):
        assert result.status == 400
        assert json.loads(result.body().decode())["error"]["code"] == result.code
        assert len(result.body().splitlines()) == 1
    else:
        assert (not result.prompts) == (result.dialog is not None)


def test_every_field_is_in_the_documentation() -> None:
    page = (Path(__file__).parents[2] / "docs/requests.md").read_text()
    table = "\n".join(line.split("|")[1] for line in page.splitlines() if line.startswith("| `"))
    assert not [name for name in ("prompt", "dialog", *OPTIONAL) if f"`{name}`" not in table]
    assert {*OPTIONAL, "prompt", "dialog"} == native._Body.model_fields.keys()


def test_a_prompt_s_log_probabilities_are_a_list_like_the_answer_s() -> None:
    formatter = NativeReplies(parse(prompt="x", prompt_logprobs=1, max_new_tokens=0), [7, 5], WORDS.__getitem__, 16)
    end = delta(finish_reason=FinishReason.LENGTH, prompt_logprobs=[Logprobs(-0.5, ((6, -0.25),))])
    answer = json.loads(formatter.answer([end], Usage(2, 0)))
    assert answer["prompt_logprobs"] == [
        {"id": 7, "token": "", "bytes": [], "logprob": None, "top_logprobs": []},
        {
            "id": 5,
            "token": " fox",
            "bytes": list(b" fox"),
            "logprob": -0.5,
            "top_logprobs": [{"id": 6, "token": "\ufffd", "bytes": [0xC3], "logprob": -0.25}],
        },
    ]
    assert (answer["text"], answer["finish_reason"]) == ("", "length")
