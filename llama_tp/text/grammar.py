"""What an answer's text must match: a JSON schema, a regular expression, one of several texts, or a grammar."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

WHITESPACE = r"\n{0,2}[ \t]{0,20}"
"""Between JSON's tokens, as a regular expression: enough for indentation, too little for endless blank lines."""


class GrammarError(ValueError):
    """The grammar is invalid, uses what is not supported, or is too complex. str() says which."""


@dataclass(frozen=True, slots=True)
class Grammar:
    """A grammar that has not been compiled, and may be invalid. Equal grammars have the same language."""

    kind: Literal["json_schema", "regex", "choice", "grammar", "lark"]
    source: str
    """JSON text of the schema or of the list of choices, the regular expression, or a grammar: in Lark's or llama.cpp's
    (GBNF) notation, or surely in Lark's."""
    otherwise: Grammar | None = None
    """What the text may match instead."""

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | bool) -> Grammar:
        """Any JSON value that is valid under a schema, which is an object or a boolean."""
        return cls("json_schema", json.dumps(schema, ensure_ascii=False))

    @classmethod
    def json_object(cls) -> Grammar:
        """Any JSON object."""
        return cls.json_schema({"type": "object"})

    @classmethod
    def regex(cls, pattern: str) -> Grammar:
        """A text that a regular expression matches from beginning to end."""
        return cls("regex", pattern)

    @classmethod
    def choice(cls, choices: Sequence[str]) -> Grammar:
        """One of several texts."""
        return cls("choice", json.dumps(list(choices), ensure_ascii=False))

    @classmethod
    def of_notation(cls, text: str) -> Grammar:
        """A text of a grammar in Lark's or llama.cpp's (GBNF) notation."""
        return cls("grammar", text)


def quoted(text: str) -> str:
    """A text in Lark's notation."""
    return json.dumps(text, ensure_ascii=False)


def with_whitespace(schema: Mapping[str, Any] | bool) -> Mapping[str, Any] | bool:
    """A schema that also says what may stand between JSON's tokens."""
    if schema is False:
        return False
    return {**({} if schema is True else schema), "x-guidance": {"whitespace_pattern": WHITESPACE}}
