"""Tool calls from a chat's body to its reply: a real engine with a tiny random model, held to the grammar of calls."""

from __future__ import annotations

import json

import jsonschema
import pytest

from llama_tp.engine.loop import EngineLoop
from llama_tp.engine.sampling_params import KNOBS
from llama_tp.model_args import ModelArgs
from llama_tp.serving.generation import RequestDefaults
from llama_tp.serving.service import LlamaService
from llama_tp.text.chat import chat_format
from llama_tp.text.dialog import Message
from llama_tp.text.tools.choose import choose_tools
from tests.tiny_model import engine_of, random_model
from tests.unit.text_fixtures import tiny

DEFAULTS = RequestDefaults(
    mode="chat", max_new_tokens=300, seed=None, sampling={knob.name: knob.default for knob in KNOBS}
)
CHAT = "v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Where is the fox?"}]
PARAMETERS = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}, "exact": {"type": "boolean"}},
    "required": ["a", "exact"],
    "additionalProperties": False,
}
ADD = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": PARAMETERS}}
NOW = {"type": "function", "function": {"name": "now"}}
NAMED = {"type": "function", "function": {"name": "add"}}


@pytest.fixture(scope="module")
def tokenizer():
    return tiny("sentencepiece")


@pytest.fixture(scope="module", params=["hermes", "llama3_json", "pythonic"])
def service(tokenizer, request):
    args = ModelArgs(dim=64, n_layers=1, n_heads=4, n_kv_heads=2, vocab_size=tokenizer.vocab_size, multiple_of=32)
    loop = EngineLoop(engine_of(random_model(args, seed=3), max_seq_len=2048), abandon_after_s=3600)
    loop.start()
    chat = chat_format("llama2", tokenizer)
    tools = choose_tools(request.param, chat, tokenizer)
    yield LlamaService(loop, tokenizer, chat, DEFAULTS, model_name="llama", tools=tools)
    loop.stop()


def ask(service, **body):
    """Status and bodies of the replies."""
    service.open("one", json.dumps({"messages": MESSAGES, **body}).encode(), CHAT)
    replies = []
    while service.open_ids:
        replies += service.poll(1.0)
    return replies[0].status, b"".join(reply.body for reply in replies)


def choices_of(service, **body):
    status, answer = ask(service, **body)
    assert status == 200, answer
    return json.loads(answer)["choices"]


def deltas_of(service, **body):
    status, answer = ask(service, stream=True, **body)
    assert status == 200, answer
    events = [json.loads(line[6:]) for line in answer.decode().split("\n\n") if line.startswith("data: {")]
    return [event["choices"][0] for event in events]


def test_a_required_call_is_valid_and_has_its_own_id(service):
    choices = choices_of(service, tools=[ADD, NOW], tool_choice="required", n=8, seed=1)
    ended = [choice for choice in choices if choice["finish_reason"] == "tool_calls"]
    assert len(ended) >= 4
    ids = set()
    for choice in ended:
        assert choice["message"]["content"] is None
        for call in choice["message"]["tool_calls"]:
            assert call["type"] == "function"
            ids.add(call["id"])
            if call["function"]["name"] == "add":
                jsonschema.validate(json.loads(call["function"]["arguments"]), PARAMETERS)
    assert len(ids) == sum(len(choice["message"]["tool_calls"]) for choice in ended)


def test_a_named_tool_is_called_once_without_parallel_calls(service):
    for choice in choices_of(service, tools=[ADD, NOW], tool_choice=NAMED, parallel_tool_calls=False, n=6, seed=2):
        if choice["finish_reason"] == "tool_calls":
            assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == ["add"]


def test_streamed_calls_add_up_to_the_whole_ones(service):
    fields = {"tools": [ADD, NOW], "tool_choice": "required", "seed": 11}
    (whole,) = choices_of(service, **fields)
    calls, content = [], ""
    for choice in deltas_of(service, **fields):
        content += choice["delta"].get("content") or ""
        for delta in choice["delta"].get("tool_calls", ()):
            if "id" in delta:
                assert delta["index"] == len(calls)
                calls.append({"id": delta["id"], "type": delta["type"], "function": dict(delta["function"])})
            else:
                calls[delta["index"]]["function"]["arguments"] += delta["function"]["arguments"]
    assert choice["finish_reason"] == whole["finish_reason"]
    assert [call["function"] for call in calls] == [call["function"] for call in whole["message"]["tool_calls"]]
    assert content == ""


@pytest.mark.parametrize("choice", ["auto", "none"])
def test_an_answer_need_not_call(choice, service):
    (answer,) = choices_of(service, tools=[ADD], tool_choice=choice, seed=1, max_tokens=5)
    assert answer["message"]["content"]
    assert "tool_calls" not in answer["message"]


def test_an_answer_that_may_call_has_the_prescribed_form_otherwise(service):
    fields = {"tools": [NOW], "structured_outputs": {"choice": ["yes", "no"]}}
    for choice in choices_of(service, **fields, n=8, seed=4):
        if choice["finish_reason"] == "stop":
            assert choice["message"]["content"] in ("yes", "no")
        elif choice["finish_reason"] == "tool_calls":
            function = choice["message"]["tool_calls"][0]["function"]
            assert (function["name"], json.loads(function["arguments"])) == ("now", {})


def test_results_go_back_to_the_model(service):
    call = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "exact": true}'}}
    dialog = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "3"},
    ]
    status, body = ask(service, messages=dialog, tools=[ADD], max_tokens=3)
    assert status == (200 if service._admission._tools.format.name == "hermes" else 400), body


def test_an_error_in_a_dialog_names_the_message_as_the_client_counts(service):
    status, body = ask(service, messages=[*MESSAGES, *MESSAGES], tools=[ADD])
    assert (status, json.loads(body)["error"]["param"]) == (400, "messages[1].role")


def test_a_long_list_of_tools_counts_as_part_of_the_prompt(service):
    tools = [{"type": "function", "function": {"name": f"f{i}", "description": "x" * 5000}} for i in range(100)]
    status, body = ask(service, tools=tools)
    assert (status, json.loads(body)["error"]["code"]) == (400, "context_length_exceeded")


def test_a_schema_that_cannot_be_followed_is_refused_only_if_a_call_is_required(service):
    schema = {"type": "object", "properties": {"a": {"not": {}}}, "required": ["a"]}
    odd = {"type": "function", "function": {"name": "odd", "parameters": schema}}
    status, body = ask(service, tools=[odd], tool_choice="required")
    error = json.loads(body)["error"]
    assert (status, error["code"], error["param"]) == (400, "invalid_grammar", "tools")
    assert ask(service, tools=[odd], max_tokens=2)[0] == 200


TEMPLATE = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }}{% for c in m.tool_calls %}<tool_call>{{ c.function | tojson }}"
    "</tool_call>{% endfor %}\n{% endfor %}{% if tools %}TOOLS {{ tools | tojson }}\n{% endif %}"
)


class Templated:
    """A tokenizer with a chat template."""

    def __init__(self, tokenizer, template):
        self._tokenizer = tokenizer
        self.chat_template = template
        self.chat_template_file = "chat_template.jinja"

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (TEMPLATE, ("hermes", True)),
        ("{{ messages }}", ("hermes", False)),
        ('{{ tools }} Respond in the format {"name": function name, "parameters": dictionary', ("llama3_json", True)),
        ("{{ tools }} [func_name1(params_name1=params_value1)]", ("pythonic", True)),
    ],
)
def test_the_chat_template_decides_the_tool_format(template, expected, tokenizer):
    words = Templated(tokenizer, template)
    tools = choose_tools("auto", chat_format("jinja", words), words)
    assert (tools.format.name, tools.in_template) == expected


def test_an_unknown_form_of_calls_is_not_guessed(tokenizer):
    words = Templated(tokenizer, "{{ tools }} [TOOL_CALLS]")
    reason = choose_tools("auto", chat_format("jinja", words), words)
    assert isinstance(reason, str)
    assert "handler.tool_format" in reason
    assert choose_tools("hermes", chat_format("jinja", words), words).in_template


def test_a_template_that_knows_tools_gets_them_as_they_are(tokenizer):
    words = Templated(tokenizer, TEMPLATE)
    chat = chat_format("jinja", words)
    tools = choose_tools("auto", chat, words)
    call = {"id": "call_1", "type": "function", "function": {"name": "now", "arguments": {}}}
    dialog = [Message("user", "When?"), Message("assistant", "", tool_calls=[call]), Message("tool", "12:00")]
    told, given = tools.dialog(dialog, [NOW])
    text = tokenizer.decode(chat.encode(told, tools=given))
    assert '<tool_call>{"name": "now", "arguments": {}}</tool_call>' in text
    assert f"TOOLS {json.dumps([NOW])}" in text


def test_a_model_without_a_known_tool_format_refuses_tools_by_name(service, tokenizer):
    other = LlamaService(service._loop, tokenizer, chat_format("llama2", tokenizer), DEFAULTS, model_name="llama")
    status, body = ask(other, tools=[NOW])
    error = json.loads(body)["error"]
    assert (status, error["code"], error["param"]) == (400, "tools_not_supported", "tools")
