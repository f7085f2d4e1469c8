"""Render dialogs with the tokenizer's jinja template."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llama_tp.text.dialog import ROLES, ChatError, Json, Message, check_last_role, check_roles
from llama_tp.text.template_process import TemplateFailure, TemplateProcess, TemplateRefusal
from llama_tp.text.tokenizer import Tokenizer
from llama_tp.text.vocabulary import require_well_formed

_CUT = "\udfff "
"""Appended to the message to continue: a surrogate, which no content contains, and a space, which trimming removes."""
_RESERVED = (
    *("messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template"),
    *("raise_exception", "strftime_now", "tojson", "range", "dict", "lipsum", "cycler", "joiner", "namespace", "self"),
)
"""Names of variables that have other fields, and of functions that templates call."""
_ROLES = (*ROLES, "tool", "ipython")
"""Llama 3.1 calls a tool's answer ipython, other models call it tool."""


class JinjaFormat:
    """The tokenizer's template, rendered as in transformers, in a limited process and jinja's sandbox.

    Only the template produces special tokens. Special pieces begin with one of a few characters, mostly `<`. Contents,
    tools and documents have these characters replaced by surrogates, which well-formed text cannot contain; the
    rendered text is split at the special pieces, and then the characters are restored. So however a template cuts,
    trims or joins, no special piece can begin in a content. Because a template may search for such text
    (`'</think>' in content`), a second rendering breaks only whole special pieces; it is used if it has exactly the
    same specials as the strict one.
    """

    name = "jinja"

    def __init__(self, tokenizer: Tokenizer) -> None:
        if not tokenizer.chat_template:
            raise ValueError("chat_format='jinja' needs a tokenizer with a chat_template; set llama2, llama3 or chatml")
        self.stop_ids = tokenizer.stop_ids
        self.origin = f"the chat_template in {tokenizer.chat_template_file}"
        self._tokenizer = tokenizer
        self._template = TemplateProcess(tokenizer.chat_template)
        self._template.check()
        pieces = sorted({*tokenizer.special_ids, *tokenizer.beyond_embedding}, key=len, reverse=True)
        self._special = re.compile(f"({'|'.join(map(re.escape, pieces))})" if pieces else "(?!)()")
        firsts = {piece[0] for piece in pieces}
        self._hide = {ord(char): 0xD800 + n for n, char in enumerate(sorted(firsts))}
        self._reveal = {surrogate: char for char, surrogate in self._hide.items()}

    def encode(
        self,
        dialog: Sequence[Message],
        *,
        continue_final_message: bool = False,
        add_generation_prompt: bool = True,
        tools: Sequence[Json] | None = None,
        documents: Sequence[Json] | None = None,
        variables: Json | None = None,
    ) -> list[int]:
        check_roles(dialog, _ROLES)
        check_last_role(
            dialog, continue_final_message=continue_final_message, add_generation_prompt=add_generation_prompt
        )
        self._check_names(variables or {})
        given = {
            "messages": [_fields(message) for message in dialog],
            "tools": tools,
            "documents": documents,
            **(variables or {}),
        }
        adds_prompt = add_generation_prompt and not continue_final_message
        _respelled(given, _well_formed)
        strict = _respelled(given, lambda text: text.translate(self._hide))
        parts = self._render(strict, continue_final_message, adds_prompt)
        if strict != given:
            broken = _respelled(given, lambda text: self._special.sub(self._broken, text))
            faithful = self._render(broken, continue_final_message, adds_prompt)
            if faithful[1::2] == parts[1::2]:
                parts = faithful
        for piece in parts[1::2]:
            if (token_id := self._tokenizer.beyond_embedding.get(piece)) is not None:
                problem = f"the tokenizer's chat_template emits {piece!r}, whose id {token_id} the model lacks"
                raise RuntimeError(problem)
        return self._tokenizer.encode_rendered([part.translate(self._reveal) for part in parts])

    def _broken(self, piece: re.Match[str]) -> str:
        return chr(self._hide[ord(piece[0][0])]) + piece[0][1:]

    def _check_names(self, variables: Json) -> None:
        """ChatError for a variable that is not the client's to set."""
        reserved = {*_RESERVED, *self._tokenizer.template_variables}
        if name := next((name for name in variables if name in reserved or name.endswith("_token")), None):
            problem = f"the variable {name} of the chat template is set by the server; leave it out"
            raise ChatError("invalid_template_variable", problem)

    def _render(self, given: dict[str, Any], continue_final_message: bool, adds_prompt: bool) -> list[str]:
        """The rendered dialog as text, special piece, text, ..., special piece, text."""
        *messages, last = given["messages"]
        cut = {**last, "content": last["content"] + _CUT} if continue_final_message else last
        variables = {
            **given,
            "messages": [*messages, cut],
            "add_generation_prompt": adds_prompt,
            **self._tokenizer.template_variables,
        }
        try:
            rendered = self._template.render(variables)
        except TemplateRefusal as error:
            message = str(error).replace(_CUT, "").translate(self._reveal)
            raise ChatError("invalid_role_order", message) from None
        except TemplateFailure as error:
            reason = str(error).translate(self._reveal)
            if given.keys() - {"messages", "tools", "documents"}:  # probably because of the client's variables
                problem = f"the chat template failed with these variables: {reason}"
                raise ChatError("invalid_template_variable", problem) from None
            raise RuntimeError(f"the tokenizer's chat_template failed: {reason}") from None
        if continue_final_message:
            rendered = _cut(rendered, last["content"], index=len(messages))
        return self._special.split(rendered)


def _fields(message: Message) -> dict[str, Any]:
    """The message as a template sees it: without fields that are not set."""
    reasoning = message.reasoning_content
    fields = {
        "role": message.role,
        "content": message.content,
        "tool_calls": list(message.tool_calls) or None,
        "tool_call_id": message.tool_call_id,
        "name": message.name,
        "reasoning_content": reasoning,
        "thinking": reasoning,  # its older name
    }
    return {key: value for key, value in fields.items() if value is not None}


def _respelled(given: dict[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """What a template is given, with every text changed except the roles, which are known words."""
    messages = [{**_each_text(message, change), "role": message["role"]} for message in given["messages"]]
    return {**_each_text(given, change), "messages": messages}


def _each_text(value: Any, change: Callable[[str], str]) -> Any:
    """A JSON value with every text changed, keys included unless a template could look them up by name."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key if key.isidentifier() else change(key): _each_text(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_each_text(item, change) for item in value]
    return value


def _well_formed(text: str) -> str:
    require_well_formed(text)
    return text


def _cut(rendered: str, content: str, *, index: int) -> str:
    """The rendered text up to the end of the last message, number `index`."""
    at = rendered.rfind(_CUT.strip())
    if at < 0 or content.strip() not in rendered[:at]:
        problem = "the model's chat template omits the last message or part of it, so it cannot be continued"
        raise ChatError("cannot_continue_message", problem, index=index, field="content")
    # a template that trims contents would have trimmed this one too
    return rendered[:at] if rendered.startswith(_CUT, at) else rendered[:at].rstrip()
