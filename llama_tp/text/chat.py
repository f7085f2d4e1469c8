"""Dialogs to the ids of a prompt that is ready for the assistant's answer: Llama 2, Llama 3, ChatML, jinja.

Knows the formats and their rules of roles; limits, types and JSON are the server's matter.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any, NoReturn, Protocol

from jinja2 import TemplateSyntaxError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llama_tp.text.tokenizer import Tokenizer
from llama_tp.text.vocabulary import require_well_formed

ROLES = ("system", "user", "assistant")

_FORGED_TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")
_HANGUL_FILLERS = "\u115f\u1160\u3164\uffa0"


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a dialog."""

    role: str
    """Who speaks; which roles there are is up to the format."""
    content: str
    """What is said: plain text, whatever is written in it."""


class ChatError(ValueError):
    """A dialog that its format refuses.

    `code` is "invalid_role", "invalid_role_order", "special_tags_not_allowed" or "empty_messages"; `index` the
    message and `field` its field, or None where the dialog as a whole is refused.
    """

    def __init__(self, code: str, message: str, *, index: int | None = None, field: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.index = index
        self.field = field

    def param(self, prefix: str) -> str:
        """Where the fault is in a request that names its dialog `prefix`: "dialog[1].role"."""
        where = prefix if self.index is None else f"{prefix}[{self.index}]"
        return where if self.field is None else f"{where}.{self.field}"


class ChatFormat(Protocol):
    """How a model has been taught to read dialogs."""

    name: str
    stop_ids: frozenset[int]
    """Ids that end the assistant's answer."""

    def encode(self, dialog: Sequence[Message]) -> list[int]:
        """Ids of the prompt. ChatError for a dialog that breaks the format's rules."""


def chat_format(name: str, tokenizer: Tokenizer) -> ChatFormat:
    """The format called llama2, llama3, chatml or jinja; "auto" finds the one that fits the tokenizer."""
    if name == "auto":
        name = _fitting_format(tokenizer)
    formats: dict[str, Callable[[Tokenizer], ChatFormat]] = {
        "llama2": Llama2Format,
        "llama3": Llama3Format,
        "chatml": ChatMLFormat,
        "jinja": JinjaFormat,
    }
    if name not in formats:
        raise ValueError(f"chat_format={name!r} is unknown; choose from auto, {', '.join(formats)}")
    return formats[name](tokenizer)


def _fitting_format(tokenizer: Tokenizer) -> str:
    if tokenizer.chat_template:
        return "jinja"
    if "<|start_header_id|>" in tokenizer.special_ids:
        return "llama3"
    if "<|im_start|>" in tokenizer.special_ids:
        return "chatml"
    if tokenizer.kind == "sentencepiece":
        return "llama2"
    raise ValueError(
        f"chat_format='auto' finds no chat format for this {tokenizer.kind} vocabulary: it has neither a template nor "
        "known chat tokens; set chat_format to llama2, llama3 or chatml"
    )


class Llama2Format:
    """[INST] ... [/INST] with the system message folded into the first turn, token for token as Meta's llama has it."""

    name = "llama2"

    def __init__(self, tokenizer: Tokenizer) -> None:
        _require_specials(self.name, tokenizer, "<s>", "</s>")
        self.stop_ids = tokenizer.stop_ids
        self._tokenizer = tokenizer

    def encode(self, dialog: Sequence[Message]) -> list[int]:
        _check_roles(dialog, ROLES)
        _check_strict_order(dialog)
        _check_forged_tags(dialog)
        turns = [message.content for message in dialog]
        if dialog[0].role == "system":
            turns[:2] = [f"<<SYS>>\n{turns[0]}\n<</SYS>>\n\n{turns[1]}"]
        *finished, last = (turn.strip() for turn in turns)
        ids: list[int] = []
        for question, answer in zip(finished[::2], finished[1::2], strict=True):
            ids += self._tokenizer.encode(f"[INST] {question} [/INST] {answer} ", bos=True, eos=True)
        return ids + self._tokenizer.encode(f"[INST] {last} [/INST]", bos=True)


class Llama3Format:
    """A header with the role, the stripped content, <|eot_id|>; as Meta's llama3 has it."""

    name = "llama3"

    def __init__(self, tokenizer: Tokenizer) -> None:
        pieces = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
        self._bos, self._header, self._end_header, self._eot = _require_specials(self.name, tokenizer, *pieces)
        self.stop_ids = tokenizer.stop_ids
        self._encode = tokenizer.encode

    def encode(self, dialog: Sequence[Message]) -> list[int]:
        _check_roles(dialog, (*ROLES, "ipython"))
        ids = [self._bos]
        for message in dialog:
            ids += [*self._head(message.role), *self._encode(message.content.strip()), self._eot]
        return ids + self._head("assistant")

    def _head(self, role: str) -> list[int]:
        return [self._header, *self._encode(role), self._end_header, *self._encode("\n\n")]


class ChatMLFormat:
    """<|im_start|>role, the content as it is, <|im_end|>."""

    name = "chatml"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._start, self._end = _require_specials(self.name, tokenizer, "<|im_start|>", "<|im_end|>")
        self.stop_ids = tokenizer.stop_ids
        self._encode = tokenizer.encode
        self._adds_bos = tokenizer.adds_bos

    def encode(self, dialog: Sequence[Message]) -> list[int]:
        _check_roles(dialog, ROLES)
        ids = self._encode("", bos=self._adds_bos)
        for message in dialog:
            turn = self._encode(f"{message.role}\n{message.content}")
            ids += [self._start, *turn, self._end, *self._encode("\n")]
        return [*ids, self._start, *self._encode("assistant\n")]


class JinjaFormat:
    """The template that came with the tokenizer, rendered as transformers renders it, in jinja's sandbox.

    Special tokens come from the template alone. A special piece begins with one of few characters, `<` above all. In
    the contents these are swapped for surrogates, which well-formed text cannot hold, then the rendered text is split
    at the special pieces, then they are swapped back: whatever a template cuts, trims or joins, no piece begins in a
    content. Since a template may look for such text (`'</think>' in content`), it is first shown contents in which
    only whole special pieces are broken so; that rendering counts if it has the very same specials as the strict one.
    """

    name = "jinja"

    def __init__(self, tokenizer: Tokenizer) -> None:
        if not tokenizer.chat_template:
            raise ValueError("chat_format='jinja' needs a tokenizer with a chat_template; set llama2, llama3 or chatml")
        self.stop_ids = tokenizer.stop_ids
        self._tokenizer = tokenizer
        self._template = _compile(tokenizer.chat_template)
        pieces = sorted(tokenizer.special_ids, key=len, reverse=True)
        self._special = re.compile(f"({'|'.join(map(re.escape, pieces))})" if pieces else "(?!)()")
        firsts = {piece[0] for piece in pieces}
        self._hide = {ord(char): 0xD800 + n for n, char in enumerate(sorted(firsts))}
        self._reveal = {surrogate: char for char, surrogate in self._hide.items()}
        piece_of = {i: piece for piece, i in tokenizer.special_ids.items()}
        self._names = {
            f"{name}_token": piece_of[i]
            for name, i in (("bos", tokenizer.bos_id), ("eos", tokenizer.eos_id))
            if i in piece_of
        }

    def encode(self, dialog: Sequence[Message]) -> list[int]:
        _check_roles(dialog, ROLES)
        contents = [message.content for message in dialog]
        for content in contents:
            require_well_formed(content)
        strict = [content.translate(self._hide) for content in contents]
        parts = self._render(dialog, strict)
        if strict != contents:
            faithful = self._render(dialog, [self._special.sub(self._broken, content) for content in contents])
            if faithful[1::2] == parts[1::2]:
                parts = faithful
        ids: list[int] = []
        for text, special in zip(parts[::2], [*parts[1::2], ""], strict=True):
            ids += self._tokenizer.encode(text.translate(self._reveal))
            if special:
                ids.append(self._tokenizer.special_ids[special])
        return ids

    def _broken(self, piece: re.Match[str]) -> str:
        return chr(self._hide[ord(piece[0][0])]) + piece[0][1:]

    def _render(self, dialog: Sequence[Message], contents: Sequence[str]) -> list[str]:
        """The rendered dialog as text, special piece, text, ..., special piece, text."""
        messages = [{"role": m.role, "content": content} for m, content in zip(dialog, contents, strict=True)]
        try:
            rendered = self._template.render(
                messages=messages, add_generation_prompt=True, tools=None, documents=None, **self._names
            )
        except _Refused as error:
            raise ChatError("invalid_role_order", str(error).translate(self._reveal)) from None
        except Exception as error:  # a template can fail in any way; none of them is the user's fault
            raise RuntimeError(f"the tokenizer's chat_template failed: {type(error).__name__}: {error}") from error
        return self._special.split(rendered)


class _Refused(Exception):
    """What a template's raise_exception raises."""


def _compile(template: str) -> Any:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)  # jinja's own escapes for HTML
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    try:
        return environment.from_string(template)
    except TemplateSyntaxError as error:
        raise ValueError(f"the tokenizer's chat_template does not compile: line {error.lineno}: {error}") from None


def _raise_exception(message: str) -> NoReturn:
    raise _Refused(message)


def _require_specials(name: str, tokenizer: Tokenizer, *pieces: str) -> list[int]:
    special_ids: Mapping[str, int] = tokenizer.special_ids
    if lacking := [piece for piece in pieces if piece not in special_ids]:
        raise ValueError(
            f"chat_format={name!r} needs the special tokens {', '.join(lacking)}, which this {tokenizer.kind} "
            "vocabulary lacks; set chat_format to auto or to the format of this model"
        )
    return [special_ids[piece] for piece in pieces]


def _check_roles(dialog: Sequence[Message], roles: Sequence[str]) -> None:
    if not dialog:
        raise ChatError("empty_messages", "the dialog has no message")
    for index, message in enumerate(dialog):
        if message.role not in roles:
            problem = f"role {message.role[:64]!r} is unknown; choose from {', '.join(roles)}"
            raise ChatError("invalid_role", problem, index=index, field="role")


def _check_strict_order(dialog: Sequence[Message]) -> None:
    """(system) user assistant user ... user."""
    num_system = 1 if dialog[0].role == "system" else 0
    rule = "roles go: at most one system first, then user and assistant in turn, user last"
    for index, message in enumerate(dialog):
        expected = "system" if index < num_system else ROLES[1 + (index - num_system) % 2]
        if message.role != expected:
            problem = f"message {index} is from {message.role!r}, expected {expected!r}; {rule}"
            raise ChatError("invalid_role_order", problem, index=index, field="role")
    if dialog[-1].role != "user":
        problem = f"the last message is from {dialog[-1].role!r}, expected 'user'; {rule}"
        raise ChatError("invalid_role_order", problem, index=len(dialog) - 1, field="role")


def _check_forged_tags(dialog: Sequence[Message]) -> None:
    for index, message in enumerate(dialog):
        seen = _as_seen(message.content)
        if tag := next((tag for tag in _FORGED_TAGS if tag in message.content or tag in seen), None):
            problem = f"the content holds the tag {tag}, which only the server may write"
            raise ChatError("special_tags_not_allowed", problem, index=index, field="content")


def _as_seen(text: str) -> str:
    """The text with look-alikes folded (NFKD) and without what is invisible: formats, controls, marks, fillers.

    Case is kept: `table[inst]` is somebody's code, not a tag.
    """
    text = unicodedata.normalize("NFKD", text)
    invisible = {c for c in set(text) if c in _HANGUL_FILLERS or _is_invisible(c)}
    return text.translate(dict.fromkeys(map(ord, invisible)))


def _is_invisible(char: str) -> bool:
    return unicodedata.category(char) in {"Cf", "Cc", "Cn", "Mn", "Me"} and not char.isspace()
