"""The process that checks grammars, run as a `LimitedProcess`.

llguidance limits its own work, but not everywhere: a schema with a thousand patterns in allOf keeps version 1.9 busy
for minutes, and takes 20 GB. So a grammar is compiled here first, without a vocabulary, and in the server only if it
takes neither long nor much memory.

Each question is {"grammar": in llguidance's notation}, answered by {} or {"invalid": reason}.
"""

from __future__ import annotations

from typing import Any

from llguidance import LLMatcher

from llama_tp.text.grammar_source import LIMITS
from llama_tp.text.limited_worker import Limits, serve

PROCESS_LIMITS = Limits(cpu_s=0.3, memory=1 << 30)
"""Ordinary schemas take milliseconds."""


def _answer(question: dict[str, Any]) -> dict[str, str]:
    is_invalid, messages = LLMatcher.validate_grammar_with_warnings(question["grammar"], limits=LIMITS)
    return {"invalid": messages[0]} if is_invalid else {}


def main() -> None:
    """Answer questions until stdin ends."""
    serve(_answer, PROCESS_LIMITS, {"invalid": "it needs too much memory"})


if __name__ == "__main__":
    main()
