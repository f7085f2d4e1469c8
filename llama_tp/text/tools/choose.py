"""How the served model calls tools."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from llama_tp.text.chat import ChatFormat
from llama_tp.text.dialog import Json, Message
from llama_tp.text.tokenizer import Tokenizer
from llama_tp.text.tools.base import ToolFormat
from llama_tp.text.tools.hermes import HermesFormat
from llama_tp.text.tools.llama_json import LlamaJsonFormat
from llama_tp.text.tools.pythonic import PythonicFormat

NAMES = ("auto", "hermes", "llama3_json", "pythonic")
_FORMATS: dict[str, Callable[[Tokenizer], ToolFormat]] = {
    "hermes": lambda tokenizer: HermesFormat(tokenizer.special_ids),
    "llama3_json": lambda _: LlamaJsonFormat(),
    "pythonic": lambda _: PythonicFormat(),
}
_SIGNS = (("<tool_call>", "hermes"), ("[func_name1(", "pythonic"), ('"parameters": ', "llama3_json"))
"""What a chat template that knows tools says of the form of calls."""


@dataclass(frozen=True, slots=True)
class Tools:
    """How a model is told of tools, and how it writes calls."""

    format: ToolFormat
    in_template: bool
    """Whether the model's chat template writes tools, calls and results; otherwise the format does."""
    origin: str
    """Why this format, for the log."""

    def dialog(
        self, dialog: Sequence[Message], tools: Sequence[Json]
    ) -> tuple[Sequence[Message], Sequence[Json] | None]:
        """The dialog and the tools as the chat format is to get them."""
        if self.in_template:
            return dialog, tools or None
        return self.format.introduce(dialog, tools), None


def choose_tools(name: str, chat: ChatFormat, tokenizer: Tokenizer) -> Tools | str:
    """The tool format with this name; "auto": the one that the chat template describes, or one that works without. Why
    there is none, if a template describes an unknown one. ValueError for an unknown name."""
    if name not in NAMES:
        raise ValueError(f"tool_format={name!r} is unknown; choose from {', '.join(NAMES)}")
    template = tokenizer.chat_template if chat.name == "jinja" else None
    in_template = template is not None and re.search(r"\btools\b", template) is not None
    if name != "auto":
        return Tools(_FORMATS[name](tokenizer), in_template, "as configured")
    if in_template:
        assert template is not None
        found = next((found for sign, found in _SIGNS if sign in template), None)
        if found is None:
            return (
                "its chat template describes calls in a form that llama-tp does not know; if it is one of "
                f"{', '.join(NAMES[1:])}, set handler.tool_format"
            )
        return Tools(_FORMATS[found](tokenizer), True, "the chat template describes it")
    found = "llama3_json" if chat.name == "llama3" else "hermes"
    return Tools(_FORMATS[found](tokenizer), False, f"the chat format {chat.name} knows no tools")


def has_tools(dialog: Collection[Message]) -> bool:
    """Whether a dialog holds calls or results of tools."""
    return any(message.tool_calls or message.role == "tool" for message in dialog)
