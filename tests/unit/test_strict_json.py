"""Strict JSON and the fields that both dialects share."""

import datetime
import gzip
import json
import time
from typing import Annotated, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import FailFast

from llama_tp.serving.encoding import MAX_ECHO, shown, to_json
from llama_tp.serving.errors import ApiError
from llama_tp.serving.fields import (
    ABSENT,
    KNOB_TYPES,
    MAX_BIASES,
    MAX_NEW_TOKENS,
    MAX_STOP_IDS,
    LogitBias,
    MaxNewTokens,
    MinNewTokens,
    NumOutputs,
    Seed,
    StopStrings,
    StopTokenIds,
    TimeoutS,
    TopLogprobs,
)
from llama_tp.serving.strict_json import MAX_DEPTH, parse_json
from llama_tp.serving.strict_model import StrictModel, validate

MAX_TOP_K = 2**31 - 1
Temperature, TopP, TopK, MinP = (KNOB_TYPES[name] for name in ("temperature", "top_p", "top_k", "min_p"))
RepetitionPenalty, Penalty = KNOB_TYPES["repetition_penalty"], KNOB_TYPES["presence_penalty"]


def refusal(body: object) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse_json(body)
    return caught.value


def nested(depth: int) -> bytes:
    """An object whose deepest list is at the given level."""
    return b'{"a":' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "invalid_json"),
        (b" \r\n\t", "invalid_json"),
        ("", "invalid_json"),
        (b"\xef\xbb\xbf", "invalid_json"),
        (b"not json", "invalid_json"),
        (b"{'a': 1}", "invalid_json"),
        (b'{"a": 1,}', "invalid_json"),
        (b'{"a": 1', "invalid_json"),
        (b'{"a": "1', "invalid_json"),
        (b'{"a": 1} trailing', "invalid_json"),
        (b'{"a": 1}{"a": 1}', "invalid_json"),
        (b'{"a": "raw \n newline"}', "invalid_json"),
        (b'{"a": 1} // comment', "invalid_json"),
        (b'{"a": 01}', "invalid_json"),
        (b'{"a": +1}', "invalid_json"),
        (b'{"a": 0x1F}', "invalid_json"),
        (b'{"a": \\"}', "invalid_json"),
        (b'{"a": NaN}', "invalid_json"),
        (b'{"a": [-Infinity]}', "invalid_json"),
        (b'{"a": Infinity}', "invalid_json"),
        (gzip.compress(b'{"prompt": "Hi"}', mtime=0), "invalid_utf8"),
        ('{"prompt": "Hi"}'.encode("utf-16"), "invalid_utf8"),
        ('{"prompt": "Hi"}'.encode("utf-16-le"), "invalid_json"),
        ('{"prompt": "Hi"}'.encode("utf-32-be"), "invalid_json"),
        ('{"prompt": "é"}'.encode("latin-1"), "invalid_utf8"),
        (b'{"a": "\xed\xa0\x80"}', "invalid_utf8"),
        (b'{"a": "\xc0\x80"}', "invalid_utf8"),
        (b"[]", "not_an_object"),
        (b"42", "not_an_object"),
        (b"null", "not_an_object"),
        (b'"text"', "not_an_object"),
        (b"true", "not_an_object"),
        (nested(MAX_DEPTH + 1), "too_deep"),
        (b"[" * 33, "too_deep"),
        (b'{"":' * 100_000, "too_deep"),
        (b'{"a": "\\\\", "b": ' + b"[" * 32, "too_deep"),
        (b'{"a": 1, "a": 2}', "duplicate_key"),
        (b'{"a": 1, "\\u0061": 2}', "duplicate_key"),
        (b'{"a": [{"b": {"c": 1, "d": 2, "c": 3}}]}', "duplicate_key"),
        (b'{"a": 1e999}', "invalid_value"),
        (b'{"a": [-1E+400]}', "invalid_value"),
        (b'{"a": ' + b"9" * 5000 + b"}", "invalid_value"),
        (b'{"a": -' + b"9" * 4000 + b"}", "invalid_value"),
        (b'{"a": "\\ud800"}', "invalid_unicode"),
        (b'{"a": ["ok", {"b": "\\udc00\\ud800"}]}', "invalid_unicode"),
        (b'{"\\udfff": 1}', "invalid_unicode"),
        ('{"a": "\ud800"}', "invalid_unicode"),
    ],
)
def test_a_body_that_is_no_strict_json_object_is_refused_with_its_code(body: bytes | str, code: str) -> None:
    error = refusal(body)
    assert (error.status, error.code) == (400, code)
    assert json.loads(error.body())["error"]["code"] == code


@pytest.mark.parametrize(
    ("body", "parsed"),
    [
        (b"{}", {}),
        (b'\xef\xbb\xbf{"a": 1}', {"a": 1}),
        ('\ufeff{"a": 1}', {"a": 1}),
        (b' \n{"a": null}\r\n', {"a": None}),
        (bytearray(b'{"a": [true]}'), {"a": [True]}),
        (memoryview(b'{"a": "b"}'), {"a": "b"}),
        (memoryview(b'{"a": "b"}' * 2)[:10], {"a": "b"}),
        ('{"a": "é\u2028😀"}', {"a": "é\u2028😀"}),
        (b'{"a": "\\ud83d\\ude00"}', {"a": "😀"}),
        (b'{"a": "\\u0000"}', {"a": "\0"}),
        (b'{"a": -0, "b": -0.0, "c": 1e-400}', {"a": 0, "b": 0.0, "c": 0.0}),
        (b'{"a": "' + b"[{" * 1000 + b'"}', {"a": "[{" * 1000}),
        (b'{"a": "\\"' + b"[" * 40 + b'\\\\"}', {"a": '"' + "[" * 40 + "\\"}),
        (b'{"a": "\\\\\\"' + b"[" * 40 + b'"}', {"a": '\\"' + "[" * 40}),
        (b'{"a": [' + b"[]," * 1000 + b"{}]}", {"a": [[]] * 1000 + [{}]}),
        ({"a": {"b": [1.5, "c", None, False]}}, {"a": {"b": [1.5, "c", None, False]}}),
    ],
)
def test_a_strict_json_object_is_parsed(body: object, parsed: dict[str, Any]) -> None:
    assert parse_json(body) == parsed


def test_the_deepest_legal_nesting_is_accepted_parsed_or_not() -> None:
    body = nested(MAX_DEPTH)
    assert parse_json(body) == parse_json(json.loads(body))


def test_a_hundred_thousand_brackets_are_refused_at_once() -> None:
    started = time.thread_time()
    assert refusal(b"[" * 100_000).code == "too_deep"
    assert time.thread_time() - started < 0.05


def test_megabytes_of_quotes_and_backslashes_take_linear_time() -> None:
    started = time.thread_time()
    assert refusal(b'{"a": "' + b'\\"' * 1_000_000).code == "invalid_json"
    assert refusal(b'"' * 1_000_000).code == "invalid_json"
    assert len(parse_json(b'{"a": "' + b"\\\\" * 1_000_000 + b'"}')["a"]) == 1_000_000
    assert time.thread_time() - started < 2


def itself() -> list[Any]:
    loop: list[Any] = []
    loop.append(loop)
    return loop


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        (None, "not_an_object", None),
        (5, "not_an_object", None),
        ([{"a": 1}], "not_an_object", None),
        ({"a": json.loads(nested(MAX_DEPTH))}, "too_deep", None),
        ({"a": itself()}, "too_deep", None),
        ({"a": [0, float("nan")]}, "invalid_value", "a[1]"),
        ({"a": {"b": float("inf")}}, "invalid_value", "a.b"),
        ({"a": 10**5000}, "invalid_value", "a"),
        ({"a": [{"b": "\ud800"}]}, "invalid_unicode", "a[0].b"),
        ({1: 2}, "invalid_type", None),
        ({"a": {None: 2}}, "invalid_type", "a"),
    ],
)
def test_a_body_parsed_by_torchserve_passes_the_checks_that_are_left(
    body: object, code: str, param: str | None
) -> None:
    error = refusal(body)
    assert (error.code, error.param) == (code, param)


def test_a_duplicate_key_is_named() -> None:
    error = refusal(b'{"prompt": "a", "top_p": 1, "prompt": "b"}')
    assert error.param == "prompt"
    assert '"prompt"' in error.message


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (404, "invalid_request_error"),
        (500, "server_error"),
        (503, "server_error"),
    ],
)
def test_an_error_has_the_shape_that_openai_clients_read(status: int, kind: str) -> None:
    error = ApiError(status, "some_code", "what is wrong", "field")
    expected = {"error": {"message": "what is wrong", "type": kind, "param": "field", "code": "some_code"}}
    assert json.loads(error.body()) == expected


def test_an_errors_body_is_one_line_of_utf8_whatever_is_in_it() -> None:
    body = ApiError(400, "c", "é \ud800\n[METRICS]\r\n\x1b CUDA", "p\n\udfff").body()
    assert b"\n" not in body
    assert b"\r" not in body
    assert json.loads(body.decode())["error"]["message"] == "é ?\n[METRICS]\r\n\x1b CUDA"
    assert json.loads(body)["error"]["param"] == "p\n?"


def test_an_errors_str_repeats_nothing_of_the_users() -> None:
    assert str(refusal(b'{"secret": 1, "secret": 2}')) == "400 duplicate_key"


def test_an_errors_message_is_bounded() -> None:
    assert len(ApiError(400, "c", "x" * 10**6).message) == 1000


@pytest.mark.parametrize("value", ["x" * 10**6, ["y"] * 10**4, {"k" * 100: 1}, "\n" * 100, "\ud800" * 100, 10**400])
def test_a_value_is_repeated_in_64_printable_characters_at_most(value: object) -> None:
    text = shown(value)
    assert len(text) == MAX_ECHO
    assert text.endswith("...")
    assert text.isprintable()


def test_a_short_value_is_repeated_whole() -> None:
    assert shown("x" * (MAX_ECHO - 2)) == '"' + "x" * (MAX_ECHO - 2) + '"'


@pytest.mark.parametrize(
    "value", [None, True, False, "hot", "it's", 'a "b"\n', 2.5, [1, None], {"a": [True, "é"]}, [], {}]
)
def test_a_value_is_repeated_as_json(value: object) -> None:
    assert shown(value) == json.dumps(value, ensure_ascii=False)


def test_characters_that_do_not_print_are_repeated_as_json_escapes() -> None:
    assert shown("a\u200b\x7f\u2028") == r'"a\u200b\u007f\u2028"'


def test_a_value_that_json_lacks_is_repeated_all_the_same() -> None:
    assert shown(datetime.date(2026, 11, 26)) == "datetime.date(2026, 11, 26)"


def test_json_is_compact_and_not_escaped() -> None:
    assert to_json({"a": ["é", 1]}) == '{"a":["é",1]}'.encode()


class Inner(StrictModel):
    name: str
    count: int = 0


class Everything(StrictModel):
    max_new_tokens: MaxNewTokens = ABSENT
    temperature: Temperature = ABSENT
    top_p: TopP = ABSENT
    top_k: TopK = ABSENT
    min_p: MinP = ABSENT
    min_new_tokens: MinNewTokens = ABSENT
    repetition_penalty: RepetitionPenalty = ABSENT
    penalty: Penalty = ABSENT
    logit_bias: LogitBias = ABSENT
    stop_token_ids: StopTokenIds = ABSENT
    top_logprobs: TopLogprobs = ABSENT
    n: NumOutputs = ABSENT
    timeout_s: TimeoutS = ABSENT
    seed: Seed = ABSENT
    stop: StopStrings = ABSENT
    flag: bool = ABSENT
    inners: Annotated[list[Inner], FailFast()] = ABSENT


class Needy(StrictModel):
    model: str


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 1),
        ("max_new_tokens", MAX_NEW_TOKENS),
        ("temperature", 0),
        ("temperature", -0.0),
        ("temperature", 2),
        ("temperature", 0.7),
        ("top_p", 1),
        ("top_p", 5e-324),
        ("top_k", 0),
        ("top_k", MAX_TOP_K),
        ("min_p", 0),
        ("min_p", 1.0),
        ("min_new_tokens", 0),
        ("min_new_tokens", MAX_NEW_TOKENS),
        ("repetition_penalty", 0.01),
        ("repetition_penalty", 10),
        ("penalty", -2),
        ("penalty", 2.0),
        ("top_logprobs", 0),
        ("top_logprobs", 20),
        ("n", 1),
        ("n", 16),
        ("timeout_s", 5e-324),
        ("timeout_s", 3600),
        ("seed", 0),
        ("seed", 2**63 - 1),
        ("stop", []),
        ("stop", ["a", "\n", "c" * 256, " "]),
        ("flag", False),
        ("inners", []),
    ],
)
def test_a_value_at_the_edge_of_its_range_is_accepted(name: str, value: object) -> None:
    assert getattr(validate(Everything, {name: value}), name) == value


def test_a_lone_stop_string_is_a_list_of_one() -> None:
    assert validate(Everything, {"stop": "a"}).stop == ["a"]


def test_biases_are_by_token_id() -> None:
    assert validate(Everything, {"logit_bias": {}}).logit_bias == {}
    assert validate(Everything, {"logit_bias": {"0": -100, "42": 100.0}}).logit_bias == {0: -100.0, 42: 100.0}
    biases = {str(token): 1 for token in range(MAX_BIASES)}
    assert len(validate(Everything, {"logit_bias": biases}).logit_bias) == MAX_BIASES


def test_stop_token_ids_are_a_list_of_ids() -> None:
    assert validate(Everything, {"stop_token_ids": []}).stop_token_ids == ()
    assert validate(Everything, {"stop_token_ids": [0] * MAX_STOP_IDS}).stop_token_ids == (0,) * MAX_STOP_IDS


@pytest.mark.parametrize(
    ("name", "value", "code", "param"),
    [
        ("max_new_tokens", 0, "invalid_value", ""),
        ("max_new_tokens", -1, "invalid_value", ""),
        ("max_new_tokens", 10**9, "invalid_value", ""),
        ("max_new_tokens", 1e9, "invalid_value", ""),
        ("max_new_tokens", 1e300, "invalid_value", ""),
        ("max_new_tokens", 2**31, "invalid_value", ""),
        ("max_new_tokens", 2**64, "invalid_value", ""),
        ("max_new_tokens", 10**300, "invalid_value", ""),
        ("max_new_tokens", "5", "invalid_type", ""),
        ("max_new_tokens", 5.0, "invalid_type", ""),
        ("max_new_tokens", 5.5, "invalid_type", ""),
        ("max_new_tokens", True, "invalid_type", ""),
        ("max_new_tokens", [5], "invalid_type", ""),
        ("temperature", -1, "invalid_value", ""),
        ("temperature", 2.1, "invalid_value", ""),
        ("temperature", 10**300, "invalid_value", ""),
        ("temperature", "hot", "invalid_type", ""),
        ("temperature", "0.5", "invalid_type", ""),
        ("temperature", True, "invalid_type", ""),
        ("top_p", 0, "invalid_value", ""),
        ("top_p", 1.1, "invalid_value", ""),
        ("top_p", -0.0, "invalid_value", ""),
        ("top_p", False, "invalid_type", ""),
        ("top_k", -1, "invalid_value", ""),
        ("top_k", -2, "invalid_value", ""),
        ("top_k", 2**31, "invalid_value", ""),
        ("top_k", 1.5, "invalid_type", ""),
        ("top_k", True, "invalid_type", ""),
        ("min_p", 2, "invalid_value", ""),
        ("min_p", -0.1, "invalid_value", ""),
        ("min_p", {}, "invalid_type", ""),
        ("min_new_tokens", -1, "invalid_value", ""),
        ("min_new_tokens", 10**9, "invalid_value", ""),
        ("min_new_tokens", 1e9, "invalid_value", ""),
        ("min_new_tokens", True, "invalid_type", ""),
        ("repetition_penalty", 0, "invalid_value", ""),
        ("repetition_penalty", 1e-40, "invalid_value", ""),
        ("repetition_penalty", 10.5, "invalid_value", ""),
        ("repetition_penalty", "1", "invalid_type", ""),
        ("penalty", -2.5, "invalid_value", ""),
        ("penalty", 3, "invalid_value", ""),
        ("logit_bias", [1], "invalid_type", ""),
        ("logit_bias", {"": 1}, "invalid_value", "."),
        ("logit_bias", {"-1": 1}, "invalid_value", ".-1"),
        ("logit_bias", {"07": 1}, "invalid_value", ".07"),
        ("logit_bias", {"7 ": 1}, "invalid_value", ".7 "),
        ("logit_bias", {"7\n": 1}, "invalid_value", ".7\\n"),
        ("logit_bias", {"٧": 1}, "invalid_value", ".٧"),
        ("logit_bias", {"1.5": 1}, "invalid_value", ".1.5"),
        ("logit_bias", {"9" * 50: 1}, "invalid_value", "." + "9" * 50),
        ("logit_bias", {"7": 1, "8": "1"}, "invalid_type", ".8"),
        ("logit_bias", {"7": None}, "invalid_type", ".7"),
        ("logit_bias", {"7": False}, "invalid_type", ".7"),
        ("logit_bias", {"7": 100.5}, "invalid_value", ".7"),
        ("logit_bias", {"7": -101}, "invalid_value", ".7"),
        ("logit_bias", {str(token): 1 for token in range(MAX_BIASES + 1)}, "invalid_value", ""),
        ("stop_token_ids", 7, "invalid_type", ""),
        ("stop_token_ids", [7, True], "invalid_type", "[1]"),
        ("stop_token_ids", [7.0], "invalid_type", "[0]"),
        ("stop_token_ids", [7] * (MAX_STOP_IDS + 1), "invalid_value", ""),
        ("top_logprobs", -1, "invalid_value", ""),
        ("top_logprobs", 21, "invalid_value", ""),
        ("top_logprobs", True, "invalid_type", ""),
        ("n", 0, "invalid_value", ""),
        ("n", 17, "invalid_value", ""),
        ("n", 1.0, "invalid_type", ""),
        ("timeout_s", 0, "invalid_value", ""),
        ("timeout_s", -1, "invalid_value", ""),
        ("timeout_s", 3600.5, "invalid_value", ""),
        ("timeout_s", "5", "invalid_type", ""),
        ("seed", 2**64, "invalid_value", ""),
        ("seed", 2**63, "invalid_value", ""),
        ("seed", -1, "invalid_value", ""),
        ("seed", 1.5, "invalid_type", ""),
        ("seed", "1", "invalid_type", ""),
        ("stop", "", "invalid_value", ""),
        ("stop", [""], "invalid_value", "[0]"),
        ("stop", ["a", 1], "invalid_type", "[1]"),
        ("stop", [None], "invalid_type", "[0]"),
        ("stop", {"a": 1}, "invalid_type", ""),
        ("stop", ["a"] * 5, "too_many_stops", ""),
        ("stop", "a" * 10_000, "invalid_value", ""),
        ("stop", ["a" * 257], "invalid_value", "[0]"),
        ("flag", 1, "invalid_type", ""),
        ("flag", "true", "invalid_type", ""),
        ("inners", {}, "invalid_type", ""),
        ("inners", [5], "invalid_type", "[0]"),
        ("inners", [{"name": "a"}, {}], "invalid_type", "[1].name"),
        ("inners", [{"name": None}], "invalid_type", "[0].name"),
        ("inners", [{"name": "a", "count": "1"}], "invalid_type", "[0].count"),
        ("inners", [{"name": "a", "counts": 1}], "unknown_field", "[0].counts"),
    ],
)
def test_a_bad_value_is_refused_naming_field_value_and_constraint(
    name: str, value: object, code: str, param: str
) -> None:
    with pytest.raises(ApiError) as caught:
        validate(Everything, {name: value})
    error = caught.value
    assert (error.status, error.code, error.param) == (400, code, name + param)
    assert error.message.startswith(name)
    assert " must " in error.message or code == "unknown_field" or error.message.endswith(" is missing")
    assert error.message.isprintable()
    assert len(error.message) < 300


def test_the_message_says_what_was_sent_and_what_is_legal() -> None:
    with pytest.raises(ApiError) as caught:
        validate(Everything, {"temperature": 2.5})
    assert caught.value.message == "temperature=2.5 must be at most 2.0"


@pytest.mark.parametrize("name", Everything.model_fields)
def test_null_means_that_a_field_is_not_given(name: str) -> None:
    assert validate(Everything, {name: None}) == Everything()
    assert name not in validate(Everything, {name: None}).model_fields_set


def test_a_null_for_a_field_that_is_needed_is_refused_as_json_writes_it() -> None:
    with pytest.raises(ApiError) as caught:
        validate(Needy, {"model": None})
    assert (caught.value.code, caught.value.param) == ("invalid_type", "model")
    assert caught.value.message == "model=null must be a string"


def test_a_missing_required_field_is_missing() -> None:
    with pytest.raises(ApiError) as caught:
        validate(Needy, {})
    assert (caught.value.code, caught.value.param) == ("missing_field", "model")
    assert caught.value.message == "model is missing"


@pytest.mark.parametrize(
    ("key", "hint"),
    [("max_tokens", "max_new_tokens"), ("temprature", "temperature"), ("TOP_K", "the fields are"), ("", "the fields")],
)
def test_an_unknown_field_is_named_together_with_the_nearest_known_one(key: str, hint: str) -> None:
    with pytest.raises(ApiError) as caught:
        validate(Everything, {"top_p": 1, key: 1})
    assert (caught.value.code, caught.value.param) == ("unknown_field", key)
    assert hint in caught.value.message


@pytest.mark.parametrize("key", ["x" * 10**6, "a\n[METRICS]CUDA:1|#:", "{0.__class__}", "%s", "{", "__class__"])
def test_a_hostile_key_is_refused_at_once_and_in_few_characters(key: str) -> None:
    started = time.thread_time()
    with pytest.raises(ApiError) as caught:
        validate(Everything, {key: "{value}" * 1000})
    assert caught.value.code == "unknown_field"
    assert len(caught.value.body()) < 600
    assert b"\n" not in caught.value.body()
    assert time.thread_time() - started < 0.5


def test_a_hundred_thousand_bad_entries_cost_no_more_than_the_first() -> None:
    started = time.thread_time()
    with pytest.raises(ApiError, match="unknown_field"):
        validate(Everything, {str(key): key for key in range(100_000)})
    with pytest.raises(ApiError, match="invalid_type"):
        validate(Everything, {"inners": [5] * 100_000})
    assert time.thread_time() - started < 0.5


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)


def outcome(body: object) -> dict[str, Any] | ApiError:
    try:
        return parse_json(body)
    except ApiError as error:
        return error


@settings(max_examples=200, deadline=None)
@given(st.binary() | st.text(st.characters()) | json_values | json_values.map(lambda v: json.dumps({"a": v})))
def test_anything_is_parsed_or_refused(body: object) -> None:
    result = outcome(body)
    if isinstance(result, ApiError):
        assert result.status == 400
        assert json.loads(result.body())["error"]["code"] == result.code
    else:
        assert parse_json(json.dumps(result, allow_nan=False).encode()) == result


def test_a_body_of_countless_values_is_refused_before_it_is_parsed() -> None:
    for body in (b'{"prompt": [' + b"1," * 300_000 + b"1]}", b"[" + b"{}," * 300_000 + b"{}]"):
        with pytest.raises(ApiError) as caught:
            parse_json(body)
        assert (caught.value.status, caught.value.code) == (400, "too_many_values")
    assert len(parse_json(json.dumps({"prompt": ", " * 300_000}))["prompt"]) == 600_000
