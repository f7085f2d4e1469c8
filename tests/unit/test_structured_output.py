"""Answers that follow a grammar, from a body to its reply: a real engine with a tiny random model."""

from __future__ import annotations

import ctypes
import json
import re
import threading

import jsonschema
import pytest

from llama_tp.engine.loop import EngineLoop
from llama_tp.engine.request import FinishReason, Request
from llama_tp.engine.sampling_params import KNOBS, SamplingParams
from llama_tp.model_args import ModelArgs
from llama_tp.serving.generation import RequestDefaults
from llama_tp.serving.service import LlamaService
from llama_tp.text.chat import chat_format
from tests.schemas import SCHEMAS
from tests.tiny_model import engine_of, random_model
from tests.unit.text_fixtures import tiny
from tests.waiting import PATIENCE_S

DEFAULTS = RequestDefaults(
    mode="text_completion", max_new_tokens=200, seed=None, sampling={knob.name: knob.default for knob in KNOBS}
)
CHAT = "v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Where is the fox?"}]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny("sentencepiece")


@pytest.fixture(scope="module")
def service(tokenizer):
    args = ModelArgs(dim=64, n_layers=1, n_heads=4, n_kv_heads=2, vocab_size=tokenizer.vocab_size, multiple_of=32)
    loop = EngineLoop(engine_of(random_model(args, seed=3), max_seq_len=512), abandon_after_s=3600)
    loop.start()
    yield LlamaService(loop, tokenizer, chat_format("llama2", tokenizer), DEFAULTS, model_name="llama")
    loop.stop()


def ask(service, route=CHAT, **body):
    """Status and bodies of the replies."""
    if route == CHAT:
        body.setdefault("messages", MESSAGES)
    else:
        body.setdefault("prompt", "The quick brown fox")
    service.open("one", json.dumps(body).encode(), route)
    replies = []
    while service.open_ids:
        replies += service.poll(1.0)
    return replies[0].status, b"".join(reply.body for reply in replies)


def error_of(service, **body):
    status, answer = ask(service, **body)
    error = json.loads(answer)["error"]
    return status, error["code"], error["param"]


def schema_format(schema):
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_answer_that_ends_with_stop_is_valid_under_its_schema(name, service):
    validator = jsonschema.Draft202012Validator(SCHEMAS[name])
    status, body = ask(service, response_format=schema_format(SCHEMAS[name]), n=6, seed=1, temperature=1)
    assert status == 200
    ended = [choice for choice in json.loads(body)["choices"] if choice["finish_reason"] == "stop"]
    assert ended
    for choice in ended:
        validator.validate(json.loads(choice["message"]["content"]))


@pytest.mark.parametrize(
    ("route", "fields", "pattern"),
    [
        (CHAT, {"response_format": {"type": "json_object"}}, r"\s*\{.*\}\s*"),
        (CHAT, {"structured_outputs": {"choice": ["yes", "no"]}}, "yes|no"),
        (CHAT, {"structured_outputs": {"regex": "[ab]{3}"}}, "[ab]{3}"),
        (CHAT, {"structured_outputs": {"json": json.dumps({"enum": [1, 2]})}}, "1|2"),
        (CHAT, {"structured_outputs": {"grammar": 'root ::= "x" [0-9]'}}, "x[0-9]"),
        (CHAT, {"structured_outputs": {"json_object": True}}, r"\s*\{.*\}\s*"),
        ("v1/completions", {"guided_regex": " jump[s]?", "max_tokens": 20}, " jump[s]?"),
        ("v1/completions", {"guided_choice": [" a", " b"], "max_tokens": 20}, " a| b"),
        ("v1/completions", {"guided_json": {"const": 7}, "max_tokens": 20}, "7"),
        ("v1/completions", {"guided_grammar": 'start: "q"', "max_tokens": 20}, "q"),
        (CHAT, {"response_format": {"type": "json_object", "schema": {"enum": [1, 2]}}}, "1|2"),
        (CHAT, {"response_format": {"type": "json_schema", "schema": {"const": 5}}}, "5"),
        (CHAT, {"json_schema": {"const": 8}}, "8"),
        (CHAT, {"grammar": 'root ::= "yes" | "no"'}, "yes|no"),
        ("", {"structured_outputs": {"choice": [" sits", " runs"]}}, " sits| runs"),
        ("", {"response_format": schema_format({"const": True})}, "true"),
    ],
)
def test_each_way_to_prescribe_the_form_of_an_answer(route, fields, pattern, service):
    status, body = ask(service, route, seed=7, **fields)
    assert status == 200, body
    answer = json.loads(body)
    choice = answer["choices"][0] if route else answer
    text = choice["message"]["content"] if route == CHAT else choice["text"]
    if choice["finish_reason"] == "stop":
        assert re.fullmatch(pattern, text, re.DOTALL)
    else:
        assert pattern.startswith(r"\s*\{"), "only an unbounded form may reach the limit"


def test_the_model_chooses_among_what_the_grammar_allows(service):
    choices = ["fox", "dog", "cat"]
    _, body = ask(service, structured_outputs={"choice": choices}, n=16, seed=1)
    found = {choice["message"]["content"] for choice in json.loads(body)["choices"]}
    assert found <= set(choices)
    assert len(found) > 1


def test_a_stream_adds_up_to_the_whole_answer(service):
    fields = {"response_format": schema_format(SCHEMAS["nested"]), "seed": 5}
    whole = json.loads(ask(service, **fields)[1])["choices"][0]["message"]["content"]
    _, body = ask(service, **fields, stream=True)
    events = [json.loads(line[6:]) for line in body.decode().split("\n\n") if line.startswith("data: {")]
    assert "".join(event["choices"][0]["delta"]["content"] for event in events) == whole


def test_a_neighbour_without_a_grammar_is_not_affected(service):
    greedy = json.dumps({"prompt": "The quick brown fox", "temperature": 0, "max_new_tokens": 40}).encode()
    service.open("alone", greedy)
    alone = [reply for _ in range(200) if service.open_ids for reply in service.poll(1.0)]
    service.open("beside", greedy)
    constrained = {"messages": MESSAGES, "response_format": schema_format(SCHEMAS["person"]), "seed": 3}
    service.open("other", json.dumps(constrained).encode(), CHAT)
    beside = [reply for _ in range(400) if service.open_ids for reply in service.poll(1.0)]
    assert next(reply.body for reply in beside if reply.request_id == "beside") == alone[0].body


def test_a_grammar_works_with_penalties_log_probabilities_and_bias(service):
    status, body = ask(
        service,
        structured_outputs={"regex": "[abc]{8}"},
        repetition_penalty=1.5,
        logit_bias={"5": -100},
        logprobs=True,
        top_logprobs=2,
        max_tokens=30,
    )
    assert status == 200
    choice = json.loads(body)["choices"][0]
    assert re.fullmatch("[abc]{8}", choice["message"]["content"])
    assert len(choice["logprobs"]["content"]) >= 1


def test_an_answer_cut_by_max_tokens_ends_with_length(service):
    _, body = ask(service, response_format=schema_format(SCHEMAS["nested"]), max_tokens=3)
    assert json.loads(body)["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"response_format": {"type": "xml"}}, "invalid_value", "response_format"),
        ({"response_format": {}}, "invalid_type", "response_format"),
        ({"response_format": "json"}, "invalid_type", "response_format"),
        ({"response_format": {"type": "json_schema"}}, "invalid_type", "response_format"),
        ({"response_format": {"type": "text", "json_schema": {}}}, "conflicting_fields", "response_format.json_schema"),
        ({"response_format": {"type": "text", "x": 1}}, "unknown_field", "response_format.x"),
        ({"response_format": {"type": "text", "schema": {}}}, "conflicting_fields", "response_format.schema"),
        (
            {"response_format": {**schema_format({}), "schema": {}}},
            "conflicting_fields",
            "response_format.schema",
        ),
        ({"response_format": {"type": "json_object", "schema": 1}}, "invalid_type", "response_format.schema"),
        ({"grammar": ""}, "invalid_value", "grammar"),
        ({"grammar": 'root ::= "a"', "json_schema": {}}, "conflicting_fields", "grammar"),
        ({"response_format": schema_format(3)}, "invalid_type", "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"nam": "a"}}},
            "unknown_field",
            "response_format.json_schema",
        ),
        ({"response_format": schema_format({"not": {}})}, "invalid_grammar", "response_format"),
        ({"structured_outputs": {"jason": {}}}, "unknown_field", "structured_outputs.jason"),
        ({"structured_outputs": {"choice": []}}, "invalid_value", "structured_outputs.choice"),
        ({"structured_outputs": {"choice": ["a", ""]}}, "invalid_value", "structured_outputs.choice"),
        ({"structured_outputs": {"choice": ["a", 1]}}, "invalid_type", "structured_outputs.choice"),
        ({"structured_outputs": {"json": "{"}}, "invalid_value", "structured_outputs.json"),
        ({"structured_outputs": {"json": 3}}, "invalid_type", "structured_outputs.json"),
        ({"structured_outputs": {"json_object": 1}}, "invalid_type", "structured_outputs.json_object"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "conflicting_fields", "structured_outputs"),
        (
            {"structured_outputs": {"json": {}, "whitespace_pattern": " "}},
            "unsupported_value",
            "structured_outputs.whitespace_pattern",
        ),
        (
            {"structured_outputs": {"json": {}, "disable_any_whitespace": True}},
            "unsupported_value",
            "structured_outputs.disable_any_whitespace",
        ),
        ({"structured_outputs": {"structural_tag": "{}"}}, "unsupported_value", "structured_outputs.structural_tag"),
        ({"structured_outputs": {"regex": "(a"}}, "invalid_grammar", "structured_outputs"),
        ({"guided_regex": ""}, "invalid_value", "guided_regex"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "conflicting_fields", "guided_regex"),
        ({"guided_regex": "a", "min_tokens": 2}, "conflicting_fields", "min_tokens"),
        ({"guided_regex": "a", "ignore_eos": True}, "conflicting_fields", "ignore_eos"),
    ],
)
def test_a_form_that_cannot_be_followed_is_refused_by_name(fields, code, param, service):
    assert error_of(service, **fields) == (400, code, param)


def test_fields_that_ask_for_nothing_are_accepted(service):
    """vLLM's own client sends all of its fields."""
    nothing = {"json_object": False, "disable_any_whitespace": False, "disable_additional_properties": False}
    nothing |= dict.fromkeys(("json", "regex", "whitespace_pattern", "structural_tag"))
    status, body = ask(service, response_format={"type": "text"}, structured_outputs=nothing, max_tokens=2)
    assert status == 200, body


class ShortGrammar:
    """Allows every token twice, and then fails."""

    num_tokens = 64
    has_failed = False

    def __init__(self):
        self.num_accepted = 0

    def start(self):
        return ShortGrammar()

    def accept(self, token_id):
        self.num_accepted += 1

    def fill_mask(self, address, num_bytes):
        self.has_failed = self.num_accepted > 1
        ctypes.memset(address, 0 if self.has_failed else 255, num_bytes)


class AnyText(ShortGrammar):
    """Allows every token, for ever."""

    def fill_mask(self, address, num_bytes):
        ctypes.memset(address, 255, num_bytes)


@pytest.mark.parametrize(
    ("more", "grammar"),
    [
        ({"allowed_ids": frozenset([5]), "bad_words": ((5,),)}, None),
        ({"allowed_ids": frozenset([5]), "bad_words": ((5,),)}, AnyText()),
        ({"allowed_ids": frozenset([5]), "stop_ids": frozenset([5]), "min_new_tokens": 3}, None),
    ],
)
def test_a_request_that_rules_out_all_tokens_ends_as_the_users_error(more, grammar):
    """Not as the model's failure: schemathesis got a 500 for allowed_token_ids with guided_choice."""
    args = ModelArgs(dim=64, n_layers=1, n_heads=4, n_kv_heads=2, vocab_size=64, multiple_of=32)
    engine = engine_of(random_model(args, seed=3), max_seq_len=64)
    engine.add(Request("impossible", (1, 2, 3), SamplingParams(max_new_tokens=8, **more), grammar))
    engine.add(Request("neighbour", (1, 2, 3), SamplingParams(max_new_tokens=2, temperature=0)))
    events = engine.step()
    errors = {event.request_id: event.error for event in events}
    assert errors == {"impossible": "no_token_allowed", "neighbour": None}
    while engine.num_requests:
        engine.step()
    assert engine.sampler.is_idle


def test_masks_are_computed_while_the_model_computes():
    """Each meets a step of the model: neither is ever done before the other has begun."""
    meeting = threading.Barrier(2)

    class Meeting(AnyText):
        def start(self):
            return Meeting()

        def fill_mask(self, address, num_bytes):
            super().fill_mask(address, num_bytes)
            meeting.wait(PATIENCE_S)

    args = ModelArgs(dim=64, n_layers=1, n_heads=4, n_kv_heads=2, vocab_size=64, multiple_of=32)
    engine = engine_of(random_model(args, seed=3), max_seq_len=64)
    execute = engine.runner.execute
    num_met = 0

    def meet(*args):
        nonlocal num_met
        meeting.wait(PATIENCE_S)
        num_met += 1
        return execute(*args)

    engine.runner.execute = meet
    engine.add(Request("one", (1, 2, 3), SamplingParams(max_new_tokens=6, temperature=0), Meeting()))
    events = [event for _ in range(6) for event in engine.step()]
    meeting.abort()
    assert ([event.error for event in events], num_met) == ([None] * 6, 6)


def test_a_grammar_that_becomes_too_complex_ends_its_own_output_only():
    args = ModelArgs(dim=64, n_layers=1, n_heads=4, n_kv_heads=2, vocab_size=64, multiple_of=32)
    engine = engine_of(random_model(args, seed=3), max_seq_len=64)
    params = SamplingParams(max_new_tokens=8, temperature=0)
    (alone,) = engine.generate([[1, 2, 3]], params)
    engine.add(Request("constrained", (1, 2, 3), params, ShortGrammar()))
    engine.add(Request("neighbour", (1, 2, 3), params))
    events = []
    while engine.num_requests:
        events += engine.step()
    failed = [event for event in events if event.request_id == "constrained"]
    assert [event.token_id for event in failed] == [*alone.token_ids[:2], None]
    assert (failed[-1].finish_reason, failed[-1].error) == (FinishReason.ERROR, "grammar_too_complex")
    assert [event.token_id for event in events if event.request_id == "neighbour"] == alone.token_ids
    assert engine.sampler.is_idle
