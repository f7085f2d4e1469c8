"""Any body, in every dialect: a request, or a refusal that is short and names a field; in bounded time."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from llama_tp.engine.sampling_params import KNOBS
from llama_tp.serving.encoding import MAX_ECHO
from llama_tp.serving.errors import MAX_MESSAGE, ApiError
from llama_tp.serving.generation import GenerationRequest
from llama_tp.serving.strict_json import MAX_VALUES
from llama_tp.text.dialog import Message
from tests.mutation import mutated, places
from tests.schema_strategy import anything
from tests.unit.documented_routes import BODIES, ROUTES, body_schema, minimal, outcome

SLOW = (HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large)
CPU_S = 3.0
"""Bounds the time of the largest body that TorchServe lets through; it takes a fifth of this."""


def refused_well(body: dict[str, Any], error: ApiError, fields: Mapping[str, Any]) -> None:
    """Assert what holds for every refusal."""
    assert 400 <= error.status < 500
    assert len(error.message) <= MAX_MESSAGE
    assert error.message.isprintable()
    assert set(json.loads(error.body().decode())["error"]) == {"message", "type", "param", "code"}
    if error.param is not None:
        root = error.param.partition("[")[0].partition(".")[0]
        assert root in fields or _names_a_key(error.param, body), error.param
    for text in texts_in(body):
        for at in range(len(error.message) - MAX_ECHO):
            assert error.message[at : at + MAX_ECHO + 1] not in text


def _names_a_key(param: str, body: dict[str, Any]) -> bool:
    """Whether a path begins with a key of the body, in which unprintable characters are escaped and the end is cut."""
    escaped = ("".join(one if one.isprintable() else json.dumps(one)[1:-1] for one in key[:32]) for key in body)
    return any(param.startswith(key[:32]) for key in escaped)


def texts_in(body: dict[str, Any]) -> list[str]:
    """Keys and values longer than may be quoted."""
    found = [part for box, key in places(body) for part in (key, box[key]) if isinstance(part, str)]
    return [text for text in found if len(text) > MAX_ECHO]


@pytest.mark.parametrize("route", ROUTES)
@settings(max_examples=300, deadline=None)
@given(body=st.binary() | st.text() | anything.map(json.dumps) | anything.map(lambda one: json.dumps(one).encode()))
@example(body=b"\x1f\x8b\x08")
@example(body=b"\xff\xfe{\x00}\x00")
@example(body=b'{"a":1e400}')
@example(body=b"-")
def test_anything_is_a_request_or_a_refusal(route: str, body: bytes | str) -> None:
    result = outcome(route, body)
    if isinstance(result, ApiError):
        assert result.status == 400
        assert len(result.message) <= MAX_MESSAGE


@pytest.mark.parametrize("is_parsed", [False, True], ids=["bytes", "parsed"])
@pytest.mark.parametrize("route", ROUTES)
@settings(max_examples=300, deadline=None, suppress_health_check=SLOW)
@given(data=st.data())
def test_what_is_almost_valid_is_a_request_or_a_refusal(route: str, is_parsed: bool, data: st.DataObject) -> None:
    """TorchServe hands over parsed JSON unless it is configured otherwise."""
    body = data.draw(mutated(BODIES[route]))
    begun = time.thread_time()
    result = outcome(route, body if is_parsed else json.dumps(body).encode())
    assert time.thread_time() - begun < CPU_S
    if isinstance(result, ApiError):
        refused_well(body, result, body_schema(route)["properties"])


@pytest.mark.parametrize("route", ROUTES)
@settings(max_examples=150, deadline=None, suppress_health_check=SLOW)
@given(data=st.data())
def test_a_key_that_occurs_twice_is_refused_at_any_depth(route: str, data: st.DataObject) -> None:
    body = {**minimal(route), **data.draw(BODIES[route])}
    found = [(box, key) for box, key in places(body) if isinstance(box, dict)]
    box, key = data.draw(st.sampled_from(found))
    box["\0"] = box[key]
    raw = json.dumps(body).replace('"\\u0000"', json.dumps(key))

    error = outcome(route, raw.encode())

    assert isinstance(error, ApiError)
    assert error.code == "duplicate_key"


# --- time

_MANY = MAX_VALUES - 16
_SIZE = 6_500_000
"""Bytes, TorchServe's default limit."""
_COUNT = _MANY // 3


def _list_of(item: bytes) -> bytes:
    return b"[" + b",".join([item] * _MANY) + b"]"


LARGEST: dict[str, Callable[[], bytes]] = {
    "brackets": lambda: b"[" * _SIZE,
    "objects": lambda: b'{"a":' * (_SIZE // 5),
    "ids": lambda: b'{"prompt":' + _list_of(b"12345") + b"}",
    "fractions": lambda: b'{"prompt":' + _list_of(b"1.5") + b"}",
    "keys": lambda: b"{" + b",".join(b'"k%d":1' % at for at in range(_MANY)) + b"}",
    "messages": lambda: json.dumps({"messages": [{"role": "user", "content": "a"}] * _COUNT}).encode(),
    "dialog": lambda: json.dumps({"dialog": [{"role": "user", "content": "a"}] * _COUNT}).encode(),
    "wrong messages": lambda: json.dumps({"messages": [{"role": 1, "content": 1}] * _COUNT}).encode(),
    "parts": lambda: json.dumps(
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}] * _COUNT}]}
    ).encode(),
    "text": lambda: json.dumps({"prompt": "a" * _SIZE}).encode(),
    "quotes": lambda: b'"' * _SIZE,
    "backslashes": lambda: b"\\" * _SIZE,
    "digits": lambda: b'{"prompt":' + b"9" * _SIZE + b"}",
    "long key": lambda: b'{"' + b"k" * _SIZE + b'":1}',
    "metadata": lambda: b'{"prompt":"a","metadata":' + _list_of(b"{}") + b"}",
    "one key": lambda: b"{" + b",".join([b'"a":1'] * _MANY) + b"}",
    "biases": lambda: json.dumps({"prompt": "a", "logit_bias": {str(at): 1 for at in range(_MANY)}}).encode(),
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", LARGEST)
def test_the_largest_bodies_take_bounded_time(route: str, name: str) -> None:
    body = LARGEST[name]()
    begun = time.thread_time()
    outcome(route, body)
    assert time.thread_time() - begun < CPU_S


# --- requests


def _text_or_ids(prompt: Any) -> Any:
    """Completions also take a list of one prompt."""
    if isinstance(prompt, list) and isinstance(prompt[0], (str, list)):
        return _text_or_ids(prompt[0])
    return prompt if isinstance(prompt, str) else tuple(prompt)


def _content(content: Any) -> str:
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


def _messages(messages: Any) -> tuple[Message, ...]:
    others = ("name", "tool_call_id", "reasoning_content")
    return tuple(
        Message(
            "system" if one["role"] == "developer" else one["role"],
            _content(one["content"]),
            **{name: one.get(name) for name in others},
        )
        for one in messages
    )


def _same(value: Any) -> Any:
    return value


SAYS: dict[str, tuple[Callable[[GenerationRequest], Any], Callable[[Any], Any]]] = {
    **{knob.name: (lambda request, name=knob.name: getattr(request.sampling, name), _same) for knob in KNOBS},
    "top_k": (lambda request: request.sampling.top_k, lambda value: max(value, 0)),
    "max_new_tokens": (lambda request: request.sampling.max_new_tokens, _same),
    "max_tokens": (lambda request: request.sampling.max_new_tokens, _same),
    "max_completion_tokens": (lambda request: request.sampling.max_new_tokens, _same),
    "min_new_tokens": (lambda request: request.sampling.min_new_tokens, _same),
    "min_tokens": (lambda request: request.sampling.min_new_tokens, _same),
    "seed": (lambda request: request.sampling.seed, _same),
    "n": (lambda request: request.sampling.n, _same),
    "logit_bias": (
        lambda request: request.sampling.logit_bias,
        lambda value: {int(token): float(bias) for token, bias in value.items()},
    ),
    "stop": (lambda request: request.stop, lambda value: (value,) if isinstance(value, str) else tuple(value)),
    "stop_token_ids": (lambda request: request.stop_token_ids, tuple),
    "ignore_eos": (lambda request: request.ignore_eos, _same),
    "timeout_s": (lambda request: request.timeout_s, _same),
    "stream": (lambda request: request.stream, _same),
    "stream_options": (
        lambda request: request.reply.usage_in_stream,
        lambda value: value.get("include_usage") is True,
    ),
    "return_token_ids": (lambda request: request.reply.token_ids, _same),
    "echo": (lambda request: request.reply.echo, _same),
    "continue_final_message": (lambda request: request.continue_final_message, _same),
    "prompt": (lambda request: request.prompt, _text_or_ids),
    "dialog": (lambda request: request.dialog, _messages),
    "messages": (lambda request: request.dialog, _messages),
    "top_logprobs": (lambda request: request.sampling.logprobs, _same),
    "logprobs": (
        lambda request: request.sampling.logprobs,
        lambda value: None,  # depends on top_logprobs: see test_openai.py and test_native.py
    ),
}
"""By field of any dialect: what a request says, and the value of the field in the request's terms."""
WITHOUT_A_VALUE = {"model", "mode", "add_generation_prompt"}
"""Fields that only must not contradict the others."""


def is_inert(field: Mapping[str, Any]) -> bool:
    return field["description"].startswith(("Accepted and ignored", "Not supported"))


def test_every_field_that_has_an_effect_is_known_here() -> None:
    for route in ROUTES:
        fields = body_schema(route)["properties"]
        unknown = [name for name, field in fields.items() if not is_inert(field) and name not in SAYS]
        assert set(unknown) <= WITHOUT_A_VALUE, f"{route}: add to SAYS what these mean: {unknown}"


def valid_body(route: str, data: st.DataObject) -> tuple[dict[str, Any], GenerationRequest]:
    """A body from the schema that agrees with itself. Fields that seldom do are drawn at other places."""
    body = {**minimal(route), **data.draw(BODIES[route])}
    for name in (*WITHOUT_A_VALUE, "dialog", "stream_options", "continue_final_message", "top_logprobs"):
        body.pop(name, None)
    if body.get("prompt", "") is None:
        del body["prompt"]
    request = outcome(route, json.dumps(body).encode())
    assume(isinstance(request, GenerationRequest))
    assert isinstance(request, GenerationRequest)
    return body, request


@pytest.mark.parametrize("route", ROUTES)
@settings(max_examples=300, deadline=None, suppress_health_check=SLOW)
@given(data=st.data())
def test_a_request_says_what_the_body_says(route: str, data: st.DataObject) -> None:
    body, request = valid_body(route, data)
    fields = body_schema(route)["properties"]
    for name, value in body.items():
        if value is not None and name != "logprobs" and name in SAYS and not is_inert(fields[name]):
            said, normal = SAYS[name]
            assert said(request) == normal(value), name


@pytest.mark.parametrize("route", ROUTES)
@settings(max_examples=150, deadline=None, suppress_health_check=SLOW)
@given(data=st.data())
def test_null_and_what_is_not_supported_have_no_effect(route: str, data: st.DataObject) -> None:
    body, request = valid_body(route, data)
    fields = body_schema(route)["properties"]
    inert = [name for name in body if body[name] is None or is_inert(fields[name])]
    rest = {name: value for name, value in body.items() if name not in inert}
    assert outcome(route, rest) == request
    nulls = {name: None for name in fields if name not in (*rest, "prompt", "dialog", "messages")}
    assert outcome(route, {**nulls, **rest}) == request
