"""Encode a dialog as a prompt for the assistant's answer: Llama 2, Llama 3, ChatML, jinja.

Knows the formats and their role rules; limits, types and JSON belong to the server.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from typing import Protocol

from llama_tp.text.chat_template import JinjaFormat
from llama_tp.text.dialog import ROLES, ChatError, Json, Message, check_last_role, check_no_template, check_roles
from llama_tp.text.tokenizer import Tokenizer

_FORGED_TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")
_HANGUL_FILLERS = "\u115f\u1160\u3164\uffa0"


class ChatFormat(Protocol):
    """The dialog format that a model was trained on."""

    name: str
    stop_ids: frozenset[int]
    """Ids that end the assistant's answer."""
    origin: str
    """Where the format came from, for the log."""

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
        """Ids of the prompt. ChatError for a dialog that breaks the format's rules.

        continue_final_message: leave the last message, which must be the assistant's, open for the answer to continue.
        add_generation_prompt: end with the beginning of the assistant's answer. False: only the dialog, whose last
        message may be the assistant's.
        tools: JSON schemas of the functions that the assistant may call, as in OpenAI's API. documents: what it may
        quote, with title and text. Both, and messages with tool_calls, need a chat template, as do variables: further
        ones for it, JSON by name.
        """


def chat_format(name: str, tokenizer: Tokenizer) -> ChatFormat:
    """The format named llama2, llama3, chatml or jinja; "auto" picks one that fits the tokenizer."""
    origin = "as configured"
    if name == "auto":
        name, origin = _fitting_format(tokenizer)
    formats: dict[str, Callable[[Tokenizer, str], ChatFormat]] = {
        "llama2": Llama2Format,
        "llama3": Llama3Format,
        "chatml": ChatMLFormat,
        "jinja": lambda tokenizer, _: JinjaFormat(tokenizer),
    }
    if name not in formats:
        raise ValueError(f"chat_format={name!r} is unknown; choose from auto, {', '.join(formats)}")
    return formats[name](tokenizer, origin)


def _fitting_format(tokenizer: Tokenizer) -> tuple[str, str]:
    """The name of a format, and why it was chosen."""
    if tokenizer.chat_template:
        return "jinja", ""
    no_template = "and there is no chat template next to the tokenizer"
    if "<|start_header_id|>" in tokenizer.special_ids:
        return "llama3", f"the vocabulary has <|start_header_id|>, {no_template}"
    if "<|im_start|>" in tokenizer.special_ids:
        return "chatml", f"the vocabulary has <|im_start|>, {no_template}"
    if "[INST]" in tokenizer.special_ids:
        raise ValueError(
            "chat_format='auto' finds no chat format: the vocabulary has [INST] as a control token, like Mistral's, "
            "and no chat template; put the model's tokenizer_config.json or chat_template.jinja next to it"
        )
    if tokenizer.kind == "sentencepiece":
        return "llama2", f"the vocabulary is a sentencepiece model, {no_template}"
    raise ValueError(
        f"chat_format='auto' finds no chat format for this {tokenizer.kind} vocabulary: it has neither a template nor "
        "known chat tokens; set chat_format to llama2, llama3 or chatml"
    )


class Llama2Format:
    """[INST] ... [/INST] with the system message folded into the first turn; token-identical to Meta's llama."""

    name = "llama2"

    def __init__(self, tokenizer: Tokenizer, origin: str) -> None:
        _require_specials(self.name, tokenizer, "<s>", "</s>")
        if "[INST]" in tokenizer.special_ids:
            raise ValueError(
                "chat_format='llama2' writes [INST] as text, but this vocabulary has it as a control token; put the "
                "model's tokenizer_config.json or chat_template.jinja next to it and set chat_format to auto"
            )
        self.origin = origin
        self.stop_ids = tokenizer.stop_ids
        self._tokenizer = tokenizer

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
        check_roles(dialog, ROLES)
        _check_strict_order(dialog)
        check_last_role(
            dialog, continue_final_message=continue_final_message, add_generation_prompt=add_generation_prompt
        )
        check_no_template(self.name, dialog, tools, documents, variables)
        _check_forged_tags(dialog)
        turns = [message.content for message in dialog]
        if dialog[0].role == "system":
            turns[:2] = [f"<<SYS>>\n{turns[0]}\n<</SYS>>\n\n{turns[1]}"]
        begun = f" {turns.pop().strip()}".rstrip() if continue_final_message else ""
        *finished, last = (turn.strip() for turn in turns)
        is_finished = dialog[-1].role == "assistant" and not continue_final_message
        if is_finished:
            finished.append(last)
        ids: list[int] = []
        for question, answer in zip(finished[::2], finished[1::2], strict=True):
            ids += self._tokenizer.encode(f"[INST] {question} [/INST] {answer} ", bos=True, eos=True)
        return ids if is_finished else ids + self._tokenizer.encode(f"[INST] {last} [/INST]{begun}", bos=True)


class Llama3Format:
    """A header with the role, the stripped content, <|eot_id|>; as in Meta's llama3."""

    name = "llama3"

    def __init__(self, tokenizer: Tokenizer, origin: str) -> None:
        specials = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
        _require_specials(self.name, tokenizer, *specials)
        self.stop_ids = tokenizer.stop_ids
        self.origin = origin
        self._encode = tokenizer.encode_rendered

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
        check_roles(dialog, (*ROLES, "ipython"))
        check_last_role(
            dialog, continue_final_message=continue_final_message, add_generation_prompt=add_generation_prompt
        )
        check_no_template(self.name, dialog, tools, documents, variables)
        parts = ["", "<|begin_of_text|>", ""]
        is_open = continue_final_message or add_generation_prompt
        for message in _with_open_answer(dialog, continue_final_message) if is_open else dialog:
            parts += ["<|start_header_id|>", message.role, "<|end_header_id|>", "\n\n" + message.content.strip()]
            parts += ["<|eot_id|>", ""]
        return self._encode(parts[:-2] if is_open else parts)


class ChatMLFormat:
    """<|im_start|>role, the unchanged content, <|im_end|>."""

    name = "chatml"

    def __init__(self, tokenizer: Tokenizer, origin: str) -> None:
        _require_specials(self.name, tokenizer, "<|im_start|>", "<|im_end|>")
        self.stop_ids = tokenizer.stop_ids
        self.origin = origin
        self._bos = tokenizer.encode("", bos=tokenizer.adds_bos)
        self._encode = tokenizer.encode_rendered

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
        check_roles(dialog, ROLES)
        check_last_role(
            dialog, continue_final_message=continue_final_message, add_generation_prompt=add_generation_prompt
        )
        check_no_template(self.name, dialog, tools, documents, variables)
        parts = [""]
        is_open = continue_final_message or add_generation_prompt
        for message in _with_open_answer(dialog, continue_final_message) if is_open else dialog:
            parts += ["<|im_start|>", f"{message.role}\n{message.content}", "<|im_end|>", "\n"]
        return self._bos + self._encode(parts[:-2] if is_open else parts)


def _with_open_answer(dialog: Sequence[Message], continue_final_message: bool) -> Sequence[Message]:
    """The dialog with the answer as its last message: one to continue, or an empty one."""
    return dialog if continue_final_message else [*dialog, Message("assistant", "")]


def _require_specials(name: str, tokenizer: Tokenizer, *pieces: str) -> None:
    if lacking := [piece for piece in pieces if piece not in tokenizer.special_ids]:
        raise ValueError(
            f"chat_format={name!r} needs the special tokens {', '.join(lacking)}, which this {tokenizer.kind} "
            "vocabulary lacks; set chat_format to auto or to the format of this model"
        )


def _check_strict_order(dialog: Sequence[Message]) -> None:
    """(system) user assistant user ..., with no lone system message."""
    num_system = 1 if dialog[0].role == "system" else 0
    rule = "roles must be an optional system, then user and assistant alternating, ending with user"
    for index, message in enumerate(dialog):
        expected = "system" if index < num_system else ROLES[1 + (index - num_system) % 2]
        if message.role != expected:
            problem = f"message {index} is from {message.role!r}, expected {expected!r}; {rule}"
            raise ChatError("invalid_role_order", problem, index=index, field="role")
    if dialog[-1].role == "system":
        problem = f"the last message is from 'system', expected 'user'; {rule}"
        raise ChatError("invalid_role_order", problem, index=len(dialog) - 1, field="role")


def _check_forged_tags(dialog: Sequence[Message]) -> None:
    for index, message in enumerate(dialog):
        seen = _as_seen(message.content)
        if tag := next((tag for tag in _FORGED_TAGS if tag in message.content or tag in seen), None):
            problem = f"the content contains the tag {tag}, which only the server may write"
            raise ChatError("special_tags_not_allowed", problem, index=index, field="content")


def _as_seen(text: str) -> str:
    """The text with look-alikes folded (NFKD) and invisible characters removed: formats, controls, marks, fillers.

    Case is kept: `table[inst]` is code, not a tag.
    """
    text = unicodedata.normalize("NFKD", text)
    invisible = {c for c in set(text) if c in _HANGUL_FILLERS or _is_invisible(c)}
    return text.translate(dict.fromkeys(map(ord, invisible)))


def _is_invisible(char: str) -> bool:
    return unicodedata.category(char) in {"Cf", "Cc", "Cn", "Mn", "Me"} and not char.isspace()
