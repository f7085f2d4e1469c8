"""Dialogs, and the rules that hold for every chat format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ROLES = ("system", "user", "assistant")

Json = Mapping[str, Any]
"""A JSON object, as parsed."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a dialog."""

    role: str
    """The speaker; each format defines its roles."""
    content: str
    """Always plain text, even if it looks like markup."""
    tool_calls: Sequence[Json] = ()
    """The assistant's calls, as templates read them: {"type": "function", "function": {"name": ..., "arguments":
    {...}}}, with arguments as an object unless the template expects text."""
    tool_call_id: str | None = None
    """The call that a message with the role "tool" answers."""
    name: str | None = None
    """The name of the speaker or of the tool."""
    reasoning_content: str | None = None
    """The assistant's reasoning before its answer."""


class ChatError(ValueError):
    """A dialog rejected by its format.

    `code` is "invalid_role", "invalid_role_order", "special_tags_not_allowed", "empty_messages",
    "cannot_continue_message", "tools_not_supported", "template_variables_not_supported" or "invalid_template_variable";
    `index` is the message and `field` its field, or None if the whole dialog is rejected.
    """

    def __init__(self, code: str, message: str, *, index: int | None = None, field: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.index = index
        self.field = field

    def param(self, prefix: str) -> str:
        """Path of the error in a request whose dialog field is `prefix`, such as "dialog[1].role"."""
        where = prefix if self.index is None else f"{prefix}[{self.index}]"
        return where if self.field is None else f"{where}.{self.field}"


def check_roles(dialog: Sequence[Message], roles: Sequence[str]) -> None:
    """ChatError for an empty dialog or an unknown role."""
    if not dialog:
        raise ChatError("empty_messages", "the dialog has no message")
    for index, message in enumerate(dialog):
        if message.role not in roles:
            problem = f"role {message.role[:64]!r} is unknown; choose from {', '.join(roles)}"
            raise ChatError("invalid_role", problem, index=index, field="role")


def check_last_role(
    dialog: Sequence[Message], *, continue_final_message: bool, add_generation_prompt: bool = True
) -> None:
    """ChatError if the last message cannot be answered, or continued. Without a generation prompt it need not be."""
    last, index = dialog[-1].role, len(dialog) - 1
    if continue_final_message and last != "assistant":
        problem = f"continue_final_message needs a last message from 'assistant', but it is from {last!r}"
        raise ChatError("cannot_continue_message", problem, index=index, field="role")
    if not continue_final_message and add_generation_prompt and last == "assistant":
        problem = (
            "the last message is from 'assistant', which leaves nothing to answer; "
            "end with another role, or set continue_final_message to continue it"
        )
        raise ChatError("invalid_role_order", problem, index=index, field="role")


def check_no_template(
    name: str,
    dialog: Sequence[Message],
    tools: Sequence[Json] | None,
    documents: Sequence[Json] | None,
    variables: Json | None = None,
) -> None:
    """ChatError for tools, calls, documents and variables, which only a chat template can write."""
    if variables:
        problem = (
            f"the chat format {name} has no variables: chat_template_kwargs are for models with a chat template; "
            "remove them, or put the model's chat template next to its tokenizer"
        )
        raise ChatError("template_variables_not_supported", problem)
    given = {
        "tools": tools,
        "documents": documents,
        "tool_calls": any(message.tool_calls for message in dialog),
    }
    if found := [key for key, value in given.items() if value]:
        problem = (
            f"the chat format {name} has no place for {', '.join(found)}; remove them, or put the model's chat "
            "template next to its tokenizer"
        )
        raise ChatError("tools_not_supported", problem)
