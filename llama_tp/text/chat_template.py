"""Render dialogs with the tokenizer's jinja template."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from datetime import datetime
from functools import partial
from typing import Any, NoReturn

from jinja2 import TemplateSyntaxError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llama_tp.text.dialog import ROLES, ChatError, Message, check_last_role, check_roles
from llama_tp.text.tokenizer import Tokenizer
from llama_tp.text.vocabulary import require_well_formed

_CUT = "\udfff "
"""Appended to the message to continue: a surrogate, which no content contains, and a space, which trimming removes."""


class JinjaFormat:
    """The tokenizer's template, rendered as in transformers, in jinja's sandbox.

    Only the template produces special tokens. Special pieces begin with one of a few characters, mostly `<`. Contents
    have these characters replaced by surrogates, which well-formed text cannot contain; the rendered text is split at
    the special pieces, and then the characters are restored. So however a template cuts, trims or joins, no special
    piece can begin in a content. Because a template may search for such text (`'</think>' in content`), a second
    rendering breaks only whole special pieces; it is used if it has exactly the same specials as the strict one.
    """

    name = "jinja"

    def __init__(self, tokenizer: Tokenizer) -> None:
        if not tokenizer.chat_template:
            raise ValueError("chat_format='jinja' needs a tokenizer with a chat_template; set llama2, llama3 or chatml")
        self.stop_ids = tokenizer.stop_ids
        self.origin = f"the chat_template in {tokenizer.chat_template_file}"
        self._tokenizer = tokenizer
        self._template = _compile(tokenizer.chat_template)
        pieces = sorted({*tokenizer.special_ids, *tokenizer.beyond_embedding}, key=len, reverse=True)
        self._special = re.compile(f"({'|'.join(map(re.escape, pieces))})" if pieces else "(?!)()")
        firsts = {piece[0] for piece in pieces}
        self._hide = {ord(char): 0xD800 + n for n, char in enumerate(sorted(firsts))}
        self._reveal = {surrogate: char for char, surrogate in self._hide.items()}

    def encode(self, dialog: Sequence[Message], *, continue_final_message: bool = False) -> list[int]:
        check_roles(dialog, ROLES)
        check_last_role(dialog, continue_final_message=continue_final_message)
        contents = [message.content for message in dialog]
        for content in contents:
            require_well_formed(content)
        strict = [content.translate(self._hide) for content in contents]
        parts = self._render(dialog, strict, continue_final_message)
        if strict != contents:
            broken = [self._special.sub(self._broken, content) for content in contents]
            faithful = self._render(dialog, broken, continue_final_message)
            if faithful[1::2] == parts[1::2]:
                parts = faithful
        for piece in parts[1::2]:
            if (token_id := self._tokenizer.beyond_embedding.get(piece)) is not None:
                problem = f"the tokenizer's chat_template emits {piece!r}, whose id {token_id} the model lacks"
                raise RuntimeError(problem)
        return self._tokenizer.encode_rendered([part.translate(self._reveal) for part in parts])

    def _broken(self, piece: re.Match[str]) -> str:
        return chr(self._hide[ord(piece[0][0])]) + piece[0][1:]

    def _render(self, dialog: Sequence[Message], contents: Sequence[str], continue_final_message: bool) -> list[str]:
        """The rendered dialog as text, special piece, text, ..., special piece, text."""
        messages = [{"role": m.role, "content": content} for m, content in zip(dialog, contents, strict=True)]
        if continue_final_message:
            messages[-1]["content"] += _CUT
        try:
            rendered = self._template.render(
                messages=messages,
                add_generation_prompt=not continue_final_message,
                tools=None,
                documents=None,
                **self._tokenizer.template_variables,
            )
        except _TemplateRefusal as error:
            message = str(error).replace(_CUT, "").translate(self._reveal)
            raise ChatError("invalid_role_order", message) from None
        except Exception as error:  # a template can fail in any way; none of them is the user's fault
            raise RuntimeError(f"the tokenizer's chat_template failed: {type(error).__name__}: {error}") from error
        if continue_final_message:
            rendered = _cut(rendered, contents)
        return self._special.split(rendered)


def _cut(rendered: str, contents: Sequence[str]) -> str:
    """The rendered text up to the end of the last message."""
    at = rendered.rfind(_CUT.strip())
    if at < 0 or contents[-1].strip() not in rendered[:at]:
        problem = "the model's chat template omits the last message or part of it, so it cannot be continued"
        raise ChatError("cannot_continue_message", problem, index=len(contents) - 1, field="content")
    # a template that trims contents would have trimmed this one too
    return rendered[:at] if rendered.startswith(_CUT, at) else rendered[:at].rstrip()


class _TemplateRefusal(Exception):
    """Raised by a template's raise_exception."""


class _GenerationBlock(Extension):
    """{% generation %} ... {% endgeneration %} marks training targets; its content is rendered as usual."""

    tags = {"generation"}  # noqa: RUF012  # jinja's interface

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _compile(template: str) -> Any:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationBlock]
    )
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)  # jinja's own escapes HTML
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    try:
        return environment.from_string(template)
    except TemplateSyntaxError as error:
        raise ValueError(f"the tokenizer's chat_template does not compile: line {error.lineno}: {error}") from None


def _raise_exception(message: str) -> NoReturn:
    raise _TemplateRefusal(message)
