"""Dialogs, and the rules that hold for every chat format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a dialog."""

    role: str
    """The speaker; each format defines its roles."""
    content: str
    """Always plain text, even if it looks like markup."""


class ChatError(ValueError):
    """A dialog rejected by its format.

    `code` is "invalid_role", "invalid_role_order", "special_tags_not_allowed", "empty_messages" or
    "cannot_continue_message"; `index` is the message and `field` its field, or None if the whole dialog is rejected.
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


def check_last_role(dialog: Sequence[Message], *, continue_final_message: bool) -> None:
    """ChatError if the last message cannot be answered, or continued."""
    last, index = dialog[-1].role, len(dialog) - 1
    if continue_final_message and last != "assistant":
        problem = f"continue_final_message needs a last message from 'assistant', but it is from {last!r}"
        raise ChatError("cannot_continue_message", problem, index=index, field="role")
    if not continue_final_message and last == "assistant":
        problem = (
            "the last message is from 'assistant', which leaves nothing to answer; "
            "end with another role, or set continue_final_message to continue it"
        )
        raise ChatError("invalid_role_order", problem, index=index, field="role")
