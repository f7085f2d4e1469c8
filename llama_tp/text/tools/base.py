"""The interface to the way in which a family of models calls tools."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

from llama_tp.text.dialog import Json, Message
from llama_tp.text.grammar import Grammar
from llama_tp.text.tools.calls import ToolCallDelta, ToolChoice

Parsed = tuple[str, list[ToolCallDelta]]
"""Text outside of calls, and new content of calls."""


class ToolCallParser(Protocol):
    """Finds the calls in one answer while its text arrives. What only looks like a call stays text: nothing is lost."""

    reads_specials: bool
    """Whether it needs the text of special tokens."""

    def push(self, text: str) -> Parsed:
        """What is now known of the answer's text so far, beyond what was returned before."""

    def flush(self) -> Parsed:
        """The rest. Call once, at the end of the answer."""


class ToolFormat(Protocol):
    """How calls are written."""

    name: str
    markers: tuple[str, ...]
    """Pieces that mark calls. A vocabulary may have them as special tokens, whose text its parser needs all the
    same."""

    def parser(self, names: Collection[str]) -> ToolCallParser:
        """For an answer that may call the tools with these names."""

    def grammar(self, tools: Sequence[Json], choice: ToolChoice, answer: Grammar | None) -> Grammar:
        """Of an answer that calls the tools as `choice` demands; if it may also do without, of `answer`, too."""

    def introduce(self, dialog: Sequence[Message], tools: Sequence[Json]) -> list[Message]:
        """The dialog, with tools, calls and their results as text, for a chat format that knows none of them."""


def name_of(tool: Json) -> str:
    """The name of a tool in OpenAI's form."""
    name: str = tool["function"]["name"]
    return name


def parameters_of(tool: Json) -> Json:
    """The JSON schema of its arguments; without one, it takes none."""
    schema: Json | None = tool["function"].get("parameters")
    return {"type": "object", "properties": {}, "additionalProperties": False} if schema is None else schema
