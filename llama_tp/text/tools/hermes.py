"""Calls between tags, as Nous Research's Hermes and many models after it write them.

    <tool_call>
    {"name": "get_weather", "arguments": {"city": "Paris"}}
    </tool_call>

Format: https://github.com/NousResearch/Hermes-Function-Calling
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

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_INTRODUCTION = """You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""
"""The wording of the templates of Hermes 3 and of the models that follow it."""


class HermesFormat:
    """The ToolFormat with tags."""

    name = "hermes"

    def __init__(self, special_ids: Collection[str]) -> None:
        """special_ids: the vocabulary's special pieces, of which the tags may be two."""
        self.markers = tuple(tag for tag in (_OPEN, _CLOSE) if tag in special_ids)

    def parser(self, names: Collection[str]) -> HermesParser:
        return HermesParser(reads_specials=bool(self.markers))

    def grammar(self, tools: Sequence[Json], choice: ToolChoice, answer: Grammar | None) -> Grammar:
        before, after = (tag if tag in self.markers else f'"{tag}"' for tag in (_OPEN, _CLOSE))
        return calls_grammar(
            *(tools, choice, answer), key="arguments", before=f'{before} "\\n"', between='"\\n"', after=f'"\\n" {after}'
        )

    def introduce(self, dialog: Sequence[Message], tools: Sequence[Json]) -> list[Message]:
        told = [_as_text(message) for message in dialog]
        if not tools:
            return told
        introduction = _INTRODUCTION.format(tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))
        if told and told[0].role == "system":
            return [replace(told[0], content=f"{told[0].content}\n\n{introduction}"), *told[1:]]
        return [Message("system", introduction), *told]


class HermesParser:
    """The ToolCallParser of one answer."""

    def __init__(self, *, reads_specials: bool) -> None:
        self.reads_specials = reads_specials
        self._num_calls = 0
        self._held = ""  # text that may belong to a tag, or precede one
        self._scanner: CallScanner | None = None
        self._is_inside = False

    def push(self, text: str) -> Parsed:
        self._held += text
        outside: list[str] = []
        calls: list[ToolCallDelta] = []
        while self._held and (self._inside(calls, outside) if self._is_inside else self._outside(outside)):
            pass
        return "".join(outside), calls

    def flush(self) -> Parsed:
        held, self._held = self._held, ""
        if not self._is_inside:
            return held.rstrip() if self._num_calls else held, []
        if self._scanner is not None and self._scanner.name is None:
            return _OPEN + self._scanner.text + held, []
        return "", []

    def _outside(self, outside: list[str]) -> bool:
        """Pass on text up to the next opening tag. Whether there is more to read."""
        at = self._held.find(_OPEN)
        if at < 0:
            keep = _length_of_possible_tag(self._held, _OPEN)
            cut = len(self._held[: len(self._held) - keep].rstrip())
            if self._num_calls and cut == 0:
                return False  # whitespace after a call is part of no text
            outside.append(self._held[:cut])
            self._held = self._held[cut:]
            return False
        before = self._held[:at].rstrip()
        outside.append(before)
        self._held = self._held[at + len(_OPEN) :]
        self._is_inside = True
        return True

    def _inside(self, calls: list[ToolCallDelta], outside: list[str]) -> bool:
        """Read a call, and the tag that closes it. Whether there is more to read."""
        if self._scanner is None:
            text = self._held.lstrip()
            if not text:
                return False
            self._held = text
            self._scanner = CallScanner(self._num_calls)
        if not (self._scanner.is_complete or self._scanner.is_broken):
            self._held = self._scanner.push(self._held)
            calls += self._scanner.take()
        if self._scanner.is_broken:
            if self._scanner.name is None:
                outside.append(_OPEN + self._scanner.text)
            return self._leave()
        if not self._scanner.is_complete:
            return False
        text = self._held.lstrip()
        if text.startswith(_CLOSE):
            self._held = text[len(_CLOSE) :]
        elif _CLOSE.startswith(text):
            return False  # the tag may still arrive
        self._num_calls += 1
        return self._leave()

    def _leave(self) -> bool:
        self._scanner, self._is_inside = None, False
        return True


def _length_of_possible_tag(text: str, tag: str) -> int:
    """How many characters at the end of the text may be the beginning of the tag."""
    return next((size for size in range(min(len(text), len(tag) - 1), 0, -1) if text.endswith(tag[:size])), 0)


def _as_text(message: Message) -> Message:
    """A message with its calls, or the result of a call, as text."""
    if message.role == "tool":
        return Message("user", f"<tool_response>\n{message.content}\n</tool_response>")
    if not message.tool_calls:
        return message
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in message.tool_calls]
    parts = [message.content, *(f"{_OPEN}\n{call}\n{_CLOSE}" for call in calls)]
    return replace(message, content="\n".join(part for part in parts if part), tool_calls=())
