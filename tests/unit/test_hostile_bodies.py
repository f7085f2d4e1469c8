"""Any body, in every dialect: a request, or a refusal that is short and names a field; in bounded time."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
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
from llama_tp.text.grammar import Grammar
from tests.mutation import mutated, places
from tests.schema_strategy import anything
from tests.unit.documented_routes import BODIES, DIALECTS, ROUTES, body_schema, minimal, outcome

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
    again = "a key that occurs nowhere else"
    box[again] = box[key]
    raw = json.dumps(body).replace(json.dumps(again), json.dumps(key))

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


def _asked(content: Any) -> bytes:
    return json.dumps({"max_tokens": 1, "messages": [{"role": "user", "content": content}]}).encode()


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
    "items": lambda: json.dumps({"input": [{"role": "user", "content": "a"}] * _COUNT}).encode(),
    "outputs": lambda: json.dumps(
        {"input": [{"type": "function_call_output", "call_id": "a", "output": "a"}] * (_COUNT - 10)}
    ).encode(),
    "blocks": lambda: _asked([{"type": "text", "text": "a"}] * (_COUNT - 10)),
    "wrong blocks": lambda: _asked([{"type": "image"}] * (_COUNT - 10)),
    "tools": lambda: json.dumps({"tools": [{"type": "function"}] * (_MANY // 2), "messages": []}).encode(),
    "calls": lambda: json.dumps(
        {"messages": [{"role": "assistant", "tool_calls": [{"type": "function"}] * (_MANY // 3)}]}
    ).encode(),
    "text of brackets": lambda: json.dumps({"prompt": "a", "guided_json": "[" * (_SIZE - 100)}).encode(),
    "text of objects": lambda: json.dumps({"messages": [], "structured_outputs": {"json": '{"a":' * 600_000}}).encode(),
    "choices": lambda: json.dumps({"prompt": "a", "guided_choice": ["a"] * _MANY}).encode(),
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


def _prompts(prompt: Any) -> Any:
    """Completions also take a list of prompts."""
    if isinstance(prompt, list) and isinstance(prompt[0], (str, list)):
        return tuple(_prompts(one)[0] for one in prompt)
    return (prompt if isinstance(prompt, str) else tuple(prompt),)


def _content(content: Any) -> str:
    if content is None:
        return ""
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


def _call(call: Any) -> dict[str, Any]:
    function = {"name": call["function"]["name"], "arguments": json.loads(call["function"]["arguments"] or "{}")}
    return {"id": call["id"], "type": "function", "function": function}


def _messages(messages: Any) -> tuple[Message, ...]:
    others = ("name", "tool_call_id", "reasoning_content")
    return tuple(
        Message(
            "system" if one["role"] == "developer" else one["role"],
            _content(one.get("content")),
            tool_calls=tuple(map(_call, one.get("tool_calls") or ())),
            **{name: one.get(name) for name in others},
        )
        for one in messages
    )


def _tools(tools: Any) -> tuple[dict[str, Any], ...]:
    """Tools of any dialect in the form of chats."""
    described = [tool.get("function", tool) for tool in tools]
    names = {"name": "name", "description": "description", "parameters": "parameters", "input_schema": "parameters"}
    functions = [
        {names[key]: value for key, value in one.items() if key in names and value is not None} for one in described
    ]
    return tuple({"type": "function", "function": function} for function in functions)


def _form(form: Any) -> Grammar | None:
    """The grammar of a format of any dialect."""
    kind = None if form is None else form["type"]
    if kind in (None, "text"):
        return None
    named = form.get("json_schema") or {}
    schema = form["schema"] if form.get("schema") is not None else named.get("schema")
    return Grammar.json_schema({"type": "object"} if schema is None else schema)


def _schema(value: Any) -> Grammar:
    return Grammar.json_schema(json.loads(value) if isinstance(value, str) else value)


_CONSTRAINTS: dict[str, Callable[[Any], Grammar | None]] = {
    "json": _schema,
    "regex": lambda value: Grammar("regex", value),
    "choice": Grammar.choice,
    "grammar": lambda value: Grammar("grammar", value),
    "json_object": lambda value: Grammar.json_object() if value else None,
}


def _constraints(value: Any) -> Grammar | None:
    given = (make(value[name]) for name, make in _CONSTRAINTS.items() if value.get(name) is not None)
    return next((grammar for grammar in given if grammar is not None), None)


def _same(value: Any) -> Any:
    return value


Meaning = tuple[Callable[[GenerationRequest], Any], Callable[[Any], Any]]
"""What a request says, and the value of a field in the request's terms."""
GRAMMARS: dict[str, Callable[[Any], Grammar | None]] = {
    "response_format": _form,
    "structured_outputs": _constraints,
    "guided_json": _schema,
    "guided_regex": _CONSTRAINTS["regex"],
    "guided_choice": _CONSTRAINTS["choice"],
    "guided_grammar": _CONSTRAINTS["grammar"],
    "json_schema": _schema,
    "grammar": _CONSTRAINTS["grammar"],
    "output_format": _form,
    "output_config": lambda value: _form(value.get("format")),
    "text": lambda value: _form(value.get("format")),
}
"""By field: the grammar that it asks for. Several fields may ask for one, or for none."""
SAYS: dict[str, Meaning] = {
    **{knob.name: (lambda request, name=knob.name: getattr(request.sampling, name), _same) for knob in KNOBS},
    "top_k": (lambda request: request.sampling.top_k, lambda value: max(value, 0)),
    **dict.fromkeys(
        ("max_new_tokens", "max_tokens", "max_completion_tokens", "max_output_tokens"),
        (lambda request: request.sampling.max_new_tokens, _same),
    ),
    "min_new_tokens": (lambda request: request.sampling.min_new_tokens, _same),
    "min_tokens": (lambda request: request.sampling.min_new_tokens, _same),
    "seed": (lambda request: request.sampling.seed, _same),
    "n": (lambda request: request.sampling.n, _same),
    "logit_bias": (
        lambda request: request.sampling.logit_bias,
        lambda value: {int(token): float(bias) for token, bias in value.items()},
    ),
    "allowed_token_ids": (lambda request: request.sampling.allowed_ids, frozenset),
    "bad_words": (lambda request: request.bad_words, tuple),
    "stop": (lambda request: request.stop, lambda value: (value,) if isinstance(value, str) else tuple(value)),
    "stop_sequences": (lambda request: request.stop, tuple),
    "stop_token_ids": (lambda request: request.stop_token_ids, tuple),
    "ignore_eos": (lambda request: request.ignore_eos, _same),
    "include_stop_str_in_output": (lambda request: request.keep_stop, _same),
    "skip_special_tokens": (lambda request: not request.special_text, _same),
    "add_special_tokens": (lambda request: request.special_tokens, _same),
    "truncate_prompt_tokens": (lambda request: request.truncate_prompt_tokens, _same),
    "timeout_s": (lambda request: request.timeout_s, _same),
    "stream": (lambda request: request.stream, _same),
    "return_token_ids": (lambda request: request.reply.token_ids, _same),
    "return_tokens_as_token_ids": (lambda request: request.reply.tokens_as_ids, _same),
    "prompt_logprobs": (lambda request: request.reply.prompt_logprobs, _same),
    "echo": (lambda request: request.reply.echo, _same),
    "continue_final_message": (lambda request: request.continue_final_message, _same),
    "chat_template_kwargs": (lambda request: request.template_variables, _same),
    "tools": (lambda request: request.tools, _tools),
    "prompt": (lambda request: request.prompts, _prompts),
    "dialog": (lambda request: request.dialog, _messages),
    **{
        name: (lambda request, name=name: request.reply.echoed[name], _same)
        for name in ("metadata", "user", "safety_identifier", "prompt_cache_key", "max_tool_calls")
    },
}
"""By field of any dialect: its meaning."""
OWN: dict[str, dict[str, Meaning]] = {
    "": {"prompt_logprobs": (lambda request: request.sampling.prompt_logprobs, _same)},
    "v1/chat/completions": {"messages": (lambda request: request.dialog, _messages)},
}
"""By route: fields that have another meaning there."""
STREAM_OPTIONS: Meaning = (
    lambda request: (request.reply.usage_in_stream, request.reply.continuous_usage),
    lambda value: (value.get("include_usage") is True, value.get("continuous_usage_stats") is True),
)
for _route in ("v1/chat/completions", "v1/completions"):
    OWN.setdefault(_route, {})["stream_options"] = STREAM_OPTIONS
WITHOUT_A_VALUE = {"model", "mode", "add_generation_prompt", "thinking", "context_management", "reasoning"}
"""Fields that only must not contradict the others, or ask for nothing."""
DEPENDENT = {"logprobs", "top_logprobs", "include", "tool_choice", "parallel_tool_calls"}
"""Fields whose meaning depends on others: the tests of the dialects have them."""


def meaning_of(route: str, name: str) -> Meaning | None:
    return OWN.get(route, {}).get(name) or SAYS.get(name)


def lines(texts: Iterable[str]) -> list[str]:
    return [line for text in texts for line in text.split("\n") if line]


def _texts_of_blocks(content: Any) -> list[str]:
    if isinstance(content, str):
        return [content]
    texts = []
    for block in content or ():
        if block["type"] == "tool_result":
            inner = "\n".join(_texts_of_blocks(block.get("content")))
            texts.append(f"Error: {inner}" if block.get("is_error") else inner)
        elif block["type"] == "text":
            texts.append(block["text"])
    return texts


def _texts_of_messages(body: dict[str, Any]) -> list[str]:
    blocks = [body.get("system"), *(message["content"] for message in body["messages"])]
    return [text for one in blocks for text in _texts_of_blocks(one)]


def _texts_of_response(body: dict[str, Any]) -> list[str]:
    given = body["input"]
    items = (
        [{"content": given}] if isinstance(given, str) else [item for item in given if item.get("type") != "reasoning"]
    )
    return [body.get("instructions") or "", *(_content(item.get("content", item.get("output"))) for item in items)]


TEXTS: dict[str, tuple[set[str], Callable[[dict[str, Any]], list[str]]]] = {
    "v1/messages": ({"system", "messages"}, _texts_of_messages),
    "v1/responses": ({"instructions", "input"}, _texts_of_response),
}
"""By route with blocks or items: the fields that make the dialog, and their texts, however these are joined."""


def is_inert(field: Mapping[str, Any]) -> bool:
    return field["description"].startswith(("Accepted and ignored", "Not supported", "Without effect"))


def test_every_field_that_has_an_effect_is_known_here() -> None:
    for route in DIALECTS:
        fields = body_schema(route)["properties"]
        unknown = {name for name, field in fields.items() if not is_inert(field) and not meaning_of(route, name)}
        unknown -= TEXTS[route][0] if route in TEXTS else set()
        unknown -= GRAMMARS.keys()
        assert unknown <= WITHOUT_A_VALUE | DEPENDENT, f"{route}: add to SAYS what these mean: {unknown}"


RARELY_AGREEING = ("dialog", "stream_options", "continue_final_message", "top_logprobs", "tool_choice", "include")
"""Fields that are drawn at other places."""


def valid_body(route: str, data: st.DataObject) -> tuple[dict[str, Any], Any]:
    """A body from the schema that agrees with itself, and its outcome."""
    body = {**minimal(route), **data.draw(BODIES[route])}
    for name in (*WITHOUT_A_VALUE, *RARELY_AGREEING):
        body.pop(name, None)
    if body.get("prompt", "") is None:
        del body["prompt"]
    result = outcome(route, json.dumps(body).encode())
    assume(not isinstance(result, ApiError))
    return body, result


@pytest.mark.parametrize("route", DIALECTS)
@settings(max_examples=300, deadline=None, suppress_health_check=SLOW)
@given(data=st.data())
def test_a_request_says_what_the_body_says(route: str, data: st.DataObject) -> None:
    body, request = valid_body(route, data)
    fields = body_schema(route)["properties"]
    for name, value in body.items():
        meaning = meaning_of(route, name)
        if value is not None and name not in DEPENDENT and meaning and not is_inert(fields[name]):
            said, normal = meaning
            assert said(request) == normal(value), name
    grammars = (meant(body[name]) for name, meant in GRAMMARS.items() if body.get(name) is not None)
    assert request.grammar == next((one for one in grammars if one is not None), None)
    if route in TEXTS:
        assert lines(message.content for message in request.dialog) == lines(TEXTS[route][1](body))


@pytest.mark.parametrize("route", ROUTES)
@settings(max_examples=150, deadline=None, suppress_health_check=SLOW)
@given(data=st.data())
def test_null_and_what_is_not_supported_have_no_effect(route: str, data: st.DataObject) -> None:
    body, result = valid_body(route, data)
    schema = body_schema(route)
    fields = schema["properties"]
    inert = [name for name in body if body[name] is None or is_inert(fields[name])]
    rest = {name: value for name, value in body.items() if name not in inert}
    assert outcome(route, rest) == result
    inputs = ("prompt", "dialog", *schema.get("required", ()))
    nulls = {name: None for name in fields if name not in (*rest, *inputs)}
    assert outcome(route, {**nulls, **rest}) == result
