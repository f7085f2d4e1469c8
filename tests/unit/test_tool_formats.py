"""Calls in answers: parsers against whole texts however they are cut, grammars against parsers."""

from __future__ import annotations

import json

import jsonschema
import pytest
import torch

from llama_tp.text.dialog import Message
from llama_tp.text.grammar import Grammar
from llama_tp.text.grammar_compiler import GrammarCompiler
from llama_tp.text.tools.calls import ToolCall, ToolChoice, whole_calls
from llama_tp.text.tools.hermes import HermesFormat
from llama_tp.text.tools.llama_json import LlamaJsonFormat
from llama_tp.text.tools.pythonic import PythonicFormat
from tests.random_text import random_text
from tests.unit.text_fixtures import tiny

FORMATS = {"hermes": HermesFormat(()), "llama3_json": LlamaJsonFormat(), "pythonic": PythonicFormat()}
NAMES = ("add", "get_weather", "now")
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds two digits.",
            "parameters": {
                "type": "object",
                "properties": {
                    "a": {"$ref": "#/$defs/digit"},
                    "b": {"$ref": "#/$defs/digit"},
                    "exactly": {"type": "boolean"},
                },
                "required": ["a", "b"],
                "additionalProperties": False,
                "$defs": {"digit": {"type": "integer", "minimum": 0, "maximum": 9}},
            },
        },
    },
    {"type": "function", "function": {"name": "now"}},
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"enum": ["Paris", "Rome"]}, "unit": {"enum": ["C", "F"]}},
                "additionalProperties": False,
            },
        },
    },
]
SCHEMAS = {tool["function"]["name"]: tool["function"].get("parameters", {"maxProperties": 0}) for tool in TOOLS}

HERMES = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'
WEATHER = ToolCall("get_weather", '{"city": "Paris"}')
ADD = ToolCall("add", '{"a": 1, "b": 2}')
CASES = [
    ("hermes", HERMES, "", [ADD]),
    ("hermes", f"Let me see.\n{HERMES}", "Let me see.", [ADD]),
    ("hermes", f"{HERMES}\n{HERMES}", "", [ADD, ADD]),
    ("hermes", f"{HERMES} Done.", " Done.", [ADD]),
    ("hermes", '<tool_call>{"arguments": {"a": 1, "b": 2}, "name": "add"}</tool_call>', "", [ADD]),
    ("hermes", '<tool_call>{"name": "now"}</tool_call>', "", [ToolCall("now", "{}")]),
    ("hermes", '<tool_call>{"name": "now", "arguments": null}</tool_call>', "", [ToolCall("now", "{}")]),
    ("hermes", '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}', "", [ToolCall("add", '{"a": 1}')]),
    ("hermes", '<tool_call>{"name": "say", "arguments": {"t": "</tool_call>}"}}</tool_call>', "",
     [ToolCall("say", '{"t": "</tool_call>}"}')]),
    ("hermes", '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b', "", [ToolCall("add", '{"a": 1, "b')]),
    ("hermes", "No calls, but a < b and <tool and\n", "No calls, but a < b and <tool and\n", []),
    ("hermes", "<tool_call>nothing</tool_call>", "<tool_call>nothing</tool_call>", []),
    ("hermes", '<tool_call>{"nam', '<tool_call>{"nam', []),
    ("hermes", '<tool_call>{"a" 1}</tool_call>', '<tool_call>{"a" 1}</tool_call>', []),
    ("llama3_json", '{"name": "get_weather", "parameters": {"city": "Paris"}}', "", [WEATHER]),
    ("llama3_json", ' {"name": "get_weather", "arguments": {"city": "Paris"}}\n', "", [WEATHER]),
    ("llama3_json", '{"type": "function", "name": "now", "parameters": {}}; {"name": "now"}', "",
     [ToolCall("now", "{}"), ToolCall("now", "{}")]),
    ("llama3_json", '{"name": "Alice", "age": 3}', '{"name": "Alice", "age": 3}', []),
    ("llama3_json", '{"age": 3}', '{"age": 3}', []),
    ("llama3_json", '{"age', '{"age', []),
    ("llama3_json", "The answer is {}.", "The answer is {}.", []),
    ("llama3_json", " ", " ", []),
    ("pythonic", '[get_weather(city="Paris")]', "", [WEATHER]),
    ("pythonic", "[add(a=1, b=2), now()]", "", [ADD, ToolCall("now", "{}")]),
    ("pythonic", "[add(a=1, b=2)]\n", "", [ADD]),
    ("pythonic", "[add(a=[1, {'x': \"]),\"}], b=(None, true))]", "",
     [ToolCall("add", '{"a": [1, {"x": "]),"}], "b": [null, true]}')]),
    ("pythonic", "[1, 2, 3]", "[1, 2, 3]", []),
    ("pythonic", "[unknown(a=1)]", "[unknown(a=1)]", []),
    ("pythonic", "[add(1, 2)]", "[add(1, 2)]", []),
    ("pythonic", "[add(a=__import__('os'))]", "[add(a=__import__('os'))]", []),
    ("pythonic", "[add(**{'a': 1})]", "[add(**{'a': 1})]", []),
    ("pythonic", "[add(a=1", "[add(a=1", []),
    ("pythonic", "[]", "[]", []),
    ("pythonic", "Hello [now()]", "Hello [now()]", []),
    ("pythonic", "[" * 5000, "[" * 5000, []),
    ("pythonic", "[add(a=" + "-" * 5000 + "1)]", "[add(a=" + "-" * 5000 + "1)]", []),
]  # fmt: skip


def parsed(form, text, size):
    """Text and calls of an answer that arrives in pieces."""
    parser = FORMATS[form].parser(NAMES)
    pieces = [parser.push(text[at : at + size]) for at in range(0, len(text), size)]
    pieces.append(parser.flush())
    return "".join(outside for outside, _ in pieces), whole_calls(call for _, calls in pieces for call in calls)


@pytest.mark.parametrize("size", [1, 2, 7, 10_000])
@pytest.mark.parametrize(("form", "text", "outside", "calls"), CASES, ids=[f"{c[0]} {c[1][:40]}" for c in CASES])
def test_calls_are_found_however_the_answer_is_cut(form, text, outside, calls, size):
    assert parsed(form, text, size) == (outside, calls)


@pytest.mark.parametrize("form", ["hermes", "llama3_json"])
def test_arguments_are_passed_on_before_the_call_is_complete(form):
    parser = FORMATS[form].parser(NAMES)
    opening = "<tool_call>" if form == "hermes" else ""
    _, calls = parser.push(opening + '{"name": "add", "arguments": {"a": 1, ')
    assert whole_calls(calls) == [ToolCall("add", '{"a": 1, ')]
    _, calls = parser.push('"b": 2')
    assert [(call.name, call.arguments) for call in calls] == [(None, '"b": 2')]


@pytest.fixture(scope="module", params=["sentencepiece", "tiktoken"])
def vocabulary(request):
    tokenizer = tiny(request.param)
    compiler = GrammarCompiler(tokenizer, tokenizer.stop_ids, num_rows=tokenizer.vocab_size)
    yield tokenizer, compiler
    compiler.close()


def answers(vocabulary, grammar, count=12):
    tokenizer, compiler = vocabulary
    compiled = compiler.compile(grammar)
    texts = [
        random_text(compiled, tokenizer, torch.Generator().manual_seed(seed), longest=400) for seed in range(count)
    ]
    found = [text for text in texts if text is not None]
    assert len(found) > count // 3
    return found


@pytest.mark.parametrize("form", FORMATS)
def test_a_required_answer_consists_of_valid_calls(form, vocabulary):
    names = set()
    for text in answers(vocabulary, FORMATS[form].grammar(TOOLS, ToolChoice("required"), None)):
        outside, calls = parsed(form, text, 3)
        assert outside == ""
        assert calls
        for call in calls:
            jsonschema.validate(json.loads(call.arguments), SCHEMAS[call.name])
            names.add(call.name)
    assert len(names) > 1


@pytest.mark.parametrize("form", FORMATS)
def test_a_named_tool_is_the_only_one_and_without_parallel_calls_is_called_once(form, vocabulary):
    choice = ToolChoice("required", "add", parallel=False)
    for text in answers(vocabulary, FORMATS[form].grammar(TOOLS, choice, None)):
        _, calls = parsed(form, text, 5)
        assert [call.name for call in calls] == ["add"]


@pytest.mark.parametrize("form", FORMATS)
def test_an_answer_that_may_call_calls_or_has_its_prescribed_form(form, vocabulary):
    kinds = set()
    for text in answers(
        vocabulary, FORMATS[form].grammar(TOOLS, ToolChoice("auto"), Grammar.choice(["yes", "no"])), 30
    ):
        outside, calls = parsed(form, text, 4)
        assert bool(calls) != (outside in ("yes", "no"))
        kinds.add(bool(calls))
    assert kinds == {True, False}


CALL = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
DIALOG = [
    Message("user", "1 + 2?"),
    Message("assistant", "", tool_calls=[CALL]),
    Message("tool", "3", tool_call_id="call_1"),
]


@pytest.mark.parametrize("form", FORMATS)
def test_a_dialog_for_a_format_without_tools_holds_them_as_text(form):
    told = FORMATS[form].introduce(DIALOG, TOOLS)
    assert not any(message.tool_calls or message.role == "tool" for message in told)
    everything = "\n".join(message.content for message in told)
    assert all(name in everything for name in NAMES)
    answer = next(message for message in told if message.role == "assistant")
    assert parsed(form, answer.content, 6) == ("", [ADD])
    assert "3" in told[-1].content


@pytest.mark.parametrize("form", ["hermes", "pythonic"])
def test_tools_are_added_to_the_system_message(form):
    told = FORMATS[form].introduce([Message("system", "Be brief."), *DIALOG], TOOLS)
    assert told[0].role == "system"
    assert told[0].content.startswith("Be brief.")
    assert "get_weather" in told[0].content
    assert [message.role for message in told].count("system") == 1
