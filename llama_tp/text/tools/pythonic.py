"""Calls as a list of Python calls, as Llama 3.2 and Llama 4 write them.

    [get_weather(city="Paris"), get_time()]

Format: https://www.llama.com/docs/model-cards-and-prompt-formats/llama3_2/#-zero-shot-function-calling-
"""

from __future__ import annotations

import ast
import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any

from llama_tp.text.dialog import Json, Message
from llama_tp.text.grammar import Grammar, quoted, with_whitespace
from llama_tp.text.tools.base import Parsed, name_of, parameters_of
from llama_tp.text.tools.calls import ToolCallDelta, ToolChoice

_INTRODUCTION = """You are an expert in composing functions. You are given a question and a set of possible functions. \
Based on the question, you will need to make one or more function/tool calls to achieve the purpose.
If none of the function can be used, point it out. If the given question lacks the parameters required by the \
function, also point it out. You should only return the function call in tools call sections.

If you decide to invoke any of the function(s), you MUST put it in the format of \
[func_name1(params_name1=params_value1, params_name2=params_value2...), func_name2(params)]
You SHOULD NOT include any other text in the response.

Here is a list of functions in JSON format that you can invoke.

{tools}"""
"""Meta's wording."""
_JSON_WORDS = {"true": True, "false": False, "null": None}
_MAX_CALL = 1 << 16
"""Characters of one call."""


class PythonicFormat:
    """The ToolFormat of Python calls."""

    name = "pythonic"
    markers: tuple[str, ...] = ()

    def parser(self, names: Collection[str]) -> PythonicParser:
        return PythonicParser(names)

    def grammar(self, tools: Sequence[Json], choice: ToolChoice, answer: Grammar | None) -> Grammar:
        chosen = [tool for tool in tools if choice.name in (None, name_of(tool))]
        more = '(", " call)*' if choice.parallel else ""
        rules = [f'start: "[" call {more} "]"', f"call: {' | '.join(f'call_{index}' for index in range(len(chosen)))}"]
        for index, tool in enumerate(chosen):
            rules += _call_rules(index, name_of(tool), parameters_of(tool))
        return Grammar("lark", "\n".join(rules), None if choice.mode == "required" else answer)

    def introduce(self, dialog: Sequence[Message], tools: Sequence[Json]) -> list[Message]:
        told = [_as_text(message) for message in dialog]
        if not tools:
            return told
        listed = json.dumps([tool["function"] for tool in tools], ensure_ascii=False, indent=4)
        introduction = _INTRODUCTION.format(tools=listed)
        if told and told[0].role == "system":
            return [replace(told[0], content=f"{told[0].content}\n\n{introduction}"), *told[1:]]
        return [Message("system", introduction), *told]


class PythonicParser:
    """The ToolCallParser of one answer: if it begins with a list of calls of known tools, it is one.

    A call is passed on when it is complete: only then are its arguments known to be literals.
    """

    reads_specials = False

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._held = ""
        self._num_calls = 0
        self._at = 0  # what of it has been looked at
        self._brackets: list[str] = []
        self._quote = ""
        self._is_escaped = False
        self._is_text = False
        self._is_over = False

    def push(self, text: str) -> Parsed:
        if self._is_text or self._is_over:
            return ("" if self._is_over and not text.strip() else text), []
        self._held += text
        if not self._num_calls and self._held.lstrip()[:1] not in ("", "["):
            return self._all_text(), []
        calls: list[ToolCallDelta] = []
        while self._at < len(self._held) and not self._is_over:
            char = self._held[self._at]
            self._at += 1
            if self._ends_call(char) and not self._take(calls):
                return self._all_text(), calls
        if len(self._held) > _MAX_CALL:
            return self._all_text(), calls
        return "", calls

    def flush(self) -> Parsed:
        if self._is_over:
            return "", []
        return self._all_text(), []

    def _ends_call(self, char: str) -> bool:
        """Whether a call, or the list, ends before this character."""
        if self._quote:
            self._read_in_string(char)
        elif char in "\"'":
            self._quote = char
        elif char in "[({":
            self._brackets.append(char)
        elif char in "])}":
            if len(self._brackets) == 1:
                self._is_over = True
                return True
            del self._brackets[-1:]
        return char == "," and not self._quote and len(self._brackets) == 1

    def _read_in_string(self, char: str) -> None:
        if self._is_escaped:
            self._is_escaped = False
        elif char == "\\":
            self._is_escaped = True
        elif char == self._quote:
            self._quote = ""

    def _take(self, calls: list[ToolCallDelta]) -> bool:
        """The call that has just ended. False if it is none."""
        text = self._held[: self._at - 1].strip().removeprefix("[").strip()
        call = _parsed(text)
        if call is None or call[0] not in self._names:
            self._is_over = False
            return False
        calls.append(ToolCallDelta(self._num_calls, json.dumps(call[1], ensure_ascii=False), call[0]))
        self._num_calls += 1
        self._held, self._at = self._held[self._at :], 0
        return True

    def _all_text(self) -> str:
        self._is_text = True
        held, self._held = self._held, ""
        return held


def _parsed(text: str) -> tuple[str, dict[str, Any]] | None:
    """Name and arguments of a call; None if it is none, or not all arguments are literals with a name."""
    try:
        node = ast.parse(text, mode="eval").body
        if not isinstance(node, ast.Call) or node.args:
            return None
        arguments = {keyword.arg: _literal(keyword.value) for keyword in node.keywords}
        if None in arguments:
            return None
        json.dumps(arguments)
        return ast.unparse(node.func), {str(name): value for name, value in arguments.items()}
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None


def _literal(node: ast.expr) -> Any:
    """A literal's value, JSON's words included. ValueError for any other expression."""
    if isinstance(node, ast.Name) and node.id in _JSON_WORDS:
        return _JSON_WORDS[node.id]
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_literal(item) for item in node.elts]
    if isinstance(node, ast.Dict):
        keys = [None if key is None else _literal(key) for key in node.keys]
        return {key: _literal(value) for key, value in zip(keys, node.values, strict=True)}
    return ast.literal_eval(node)


def _call_rules(index: int, name: str, schema: Json) -> Iterator[str]:
    """The rules of a call with arguments in the schema's order: all required ones, then any others."""
    properties = schema.get("properties", {})
    required = [key for key in properties if key in schema.get("required", ())]
    optional = [key for key in properties if key not in required]
    shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    arguments = [f"{quoted(f'{key}=')} value_{index}_{at}" for at, key in enumerate([*required, *optional])]
    fixed = ' ", " '.join(arguments[: len(required)])
    rest = _optional(arguments[len(required) :], follows=bool(fixed))
    yield f'call_{index}: {quoted(name + "(")} {fixed} {rest} ")"'
    for at, key in enumerate([*required, *optional]):
        value = properties[key]
        value = {**value, **shared} if isinstance(value, dict) else value
        yield f"value_{index}_{at}: %json {json.dumps(with_whitespace(value), ensure_ascii=False)}"


def _optional(arguments: Sequence[str], *, follows: bool) -> str:
    """Any of the arguments, in order and separated; also from what precedes them, if they follow something."""
    if follows:
        return " ".join(f'(", " {argument})?' for argument in arguments)
    first = [f"{argument} {_optional(arguments[at + 1 :], follows=True)}" for at, argument in enumerate(arguments)]
    return f"({' | '.join(first)})?" if first else ""


def _as_text(message: Message) -> Message:
    """A message with its calls, or the result of a call, as text."""
    if message.role == "tool":
        return Message("ipython", message.content)
    if not message.tool_calls:
        return message
    calls = (call["function"] for call in message.tool_calls)
    written = [
        f"{call['name']}({', '.join(f'{key}={value!r}' for key, value in call['arguments'].items())})" for call in calls
    ]
    return replace(message, content=f"[{', '.join(written)}]", tool_calls=())
