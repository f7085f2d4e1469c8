"""Grammars in llguidance's notation, and the limits of their compilation.

Its documentation: https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md
"""

from __future__ import annotations

import json
from typing import Any

from llguidance import LLParserLimits, regex_to_lark
from llguidance.gbnf_to_lark import any_to_lark

from llama_tp.text.grammar import Grammar, GrammarError, quoted, with_whitespace

LIMITS = LLParserLimits(
    initial_lexer_fuel=200_000,
    step_lexer_fuel=100_000,
    step_max_items=10_000,
    max_lexer_states=20_000,
    max_grammar_size=200_000,
    verbose_errors=False,
)
"""Ordinary schemas need a hundredth of it. At worst, the mask of a token takes about 10 ms, and a grammar's states 40
MB. The compiler does not respect its limits everywhere; see `grammar_checker`."""


def source_of(grammar: Grammar, *, leading_space: bool = False) -> str:
    """The grammar as llguidance takes it; a leading_space may precede its text. GrammarError if it is in no notation
    that we know."""
    entries = [{"name": "answer", **_entry(grammar)}]
    names = "@answer"
    if grammar.otherwise is not None:
        entries.append({"name": "otherwise", **_entry(grammar.otherwise)})
        names = "(@answer | @otherwise)"
    if len(entries) > 1 or leading_space:
        space = '" "? ' if leading_space else ""
        entries.insert(0, {"lark_grammar": f"start: {space}{names}"})
    return json.dumps({"grammars": entries})


def _entry(grammar: Grammar) -> dict[str, Any]:
    if grammar.kind == "json_schema":
        return {"json_schema": with_whitespace(json.loads(grammar.source))}
    if grammar.kind == "regex":
        return {"lark_grammar": f"start: /{regex_to_lark(grammar.source)}/"}
    if grammar.kind == "choice":
        return {"lark_grammar": "start: " + " | ".join(map(quoted, json.loads(grammar.source)))}
    if grammar.kind == "lark":
        return {"lark_grammar": grammar.source}
    try:
        return {"lark_grammar": any_to_lark(grammar.source)}
    except Exception as error:  # the converter raises whatever it stumbles over
        raise GrammarError(f"it is neither in Lark's nor in llama.cpp's (GBNF) notation: {error}") from None
