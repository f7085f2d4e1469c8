"""Calls as JSON objects without any tags, as Llama 3.1 and 3.2 write them.

    {"name": "get_weather", "parameters": {"city": "Paris"}}

Several calls are separated by semicolons, as vLLM reads them. Format:
https://www.llama.com/docs/model-cards-and-prompt-formats/llama3_1/#json-based-tool-calling
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import replace

from llama_tp.text.dialog import Json, Message
from llama_tp.text.grammar import Grammar
from llama_tp.text.tools.base import Parsed
from llama_tp.text.tools.call_scanner import CallScanner
from llama_tp.text.tools.calls import ToolCallDelta, ToolChoice
from llama_tp.text.tools.calls_grammar import calls_grammar

_INTRODUCTION = """Given the following functions, please respond with a JSON for a function call with its proper \
arguments that best answers the given prompt.

Respond in the format {{"name": function name, "parameters": dictionary of argument name and its value}}. \
Do not use variables.

{tools}

"""
"""Meta's wording, which precedes the user's first message."""


class LlamaJsonFormat:
    """The ToolFormat without tags."""

    name = "llama3_json"
    markers: tuple[str, ...] = ()  # <|python_tag|>, which may precede a call, is not needed to find it

    def parser(self, names: Collection[str]) -> LlamaJsonParser:
        return LlamaJsonParser(names)

    def grammar(self, tools: Sequence[Json], choice: ToolChoice, answer: Grammar | None) -> Grammar:
        return calls_grammar(tools, choice, answer, key="parameters", between='"; "')

    def introduce(self, dialog: Sequence[Message], tools: Sequence[Json]) -> list[Message]:
        told = [_as_text(message) for message in dialog]
        first = next((at for at, message in enumerate(told) if message.role == "user"), None)
        if not tools or first is None:
            return told
        listed = "\n\n".join(json.dumps(tool, ensure_ascii=False, indent=4) for tool in tools)
        told[first] = replace(told[first], content=_INTRODUCTION.format(tools=listed) + told[first].content)
        return told


class LlamaJsonParser:
    """The ToolCallParser of one answer: if it begins with a call of a known tool, it consists of calls."""

    reads_specials = False

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._scanner: CallScanner | None = None
        self._num_calls = 0
        self._held = ""  # between calls
        self._is_text = False

    def push(self, text: str) -> Parsed:
        calls: list[ToolCallDelta] = []
        while text and not self._is_text:
            scanner = self._scanner
            text = self._between(text) if scanner is None else self._scan(scanner, text, calls)
        return text, calls

    def flush(self) -> Parsed:
        scanner, held = self._scanner, self._held
        self._scanner, self._held = None, ""
        if scanner is not None and not self._is_known(scanner):
            return held + scanner.text, []
        return ("" if self._num_calls else held), []

    def _between(self, text: str) -> str:
        """Look for the next call. Returns what is left to read."""
        self._held += text
        rest = self._held.lstrip("; \t\r\n" if self._num_calls else " \t\r\n")
        if not rest:
            return ""
        if rest[0] != "{":
            return self._all_text(self._held)
        self._held = self._held[: len(self._held) - len(rest)]
        self._scanner = CallScanner(self._num_calls)
        return rest

    def _scan(self, scanner: CallScanner, text: str, calls: list[ToolCallDelta]) -> str:
        rest = scanner.push(text)
        if scanner.is_broken or (scanner.name is not None and not self._is_known(scanner)):
            if not scanner.is_broken or not self._is_known(scanner):
                return self._all_text(self._held + scanner.text + rest)
        else:
            calls += scanner.take()
        if scanner.is_complete or scanner.is_broken:
            self._scanner, self._held = None, ""
            self._num_calls += 1
        return rest

    def _is_known(self, scanner: CallScanner) -> bool:
        return scanner.name in self._names

    def _all_text(self, text: str) -> str:
        self._is_text, self._scanner, self._held = True, None, ""
        return text


def _as_text(message: Message) -> Message:
    """A message with its calls, or the result of a call, as text."""
    if message.role == "tool":
        return Message("ipython", message.content)
    if not message.tool_calls:
        return message
    calls = [
        json.dumps({"name": call["function"]["name"], "parameters": call["function"]["arguments"]}, ensure_ascii=False)
        for call in message.tool_calls
    ]
    return replace(message, content="; ".join(calls), tool_calls=())
