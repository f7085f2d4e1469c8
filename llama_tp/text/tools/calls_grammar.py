"""Grammars of calls written as JSON objects."""

from __future__ import annotations

import json
from collections.abc import Sequence

from llama_tp.text.dialog import Json
from llama_tp.text.grammar import Grammar, quoted, with_whitespace
from llama_tp.text.tools.base import name_of, parameters_of
from llama_tp.text.tools.calls import ToolChoice


def calls_grammar(
    tools: Sequence[Json],
    choice: ToolChoice,
    answer: Grammar | None,
    *,
    key: str,
    between: str,
    before: str = "",
    after: str = "",
) -> Grammar:
    """One call or several, as `choice` says; and what the answer may be instead, unless it must call.

    key: of the arguments. before, between, after: what surrounds calls, in Lark's notation.
    """
    chosen = [tool for tool in tools if choice.name in (None, name_of(tool))]
    more = f"({between} call)*" if choice.parallel else ""
    rules = [
        f"start: call {more}",
        f"call: {before} ({' | '.join(f'call_{index}' for index in range(len(chosen)))}) {after}",
    ]
    for index, tool in enumerate(chosen):
        head = f'{{"name": {json.dumps(name_of(tool))}, "{key}": '
        schema = json.dumps(with_whitespace(parameters_of(tool)), ensure_ascii=False)
        rules += [f'call_{index}: {quoted(head)} arguments_{index} "}}"', f"arguments_{index}: %json {schema}"]
    return Grammar("lark", "\n".join(rules), None if choice.mode == "required" else answer)
