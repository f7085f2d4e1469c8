"""A dialog made of what other APIs have instead of messages: blocks, items, calls and results.

An assistant's text and calls are one message in a dialog, and each result of a tool is a message of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from llama_tp.serving.dialects.tools import tool_call
from llama_tp.serving.errors import ApiError
from llama_tp.text.dialog import Json, Message


@dataclass(slots=True)
class Turn:
    """A message of the dialog, as far as it is known. Pieces of text are joined by newlines."""

    role: str
    path: str
    """Where it begins in the body."""
    texts: list[str] = field(default_factory=list)
    thoughts: list[str] = field(default_factory=list)
    calls: list[Json] = field(default_factory=list)
    call_id: str | None = None
    """With the role "tool"."""
    name: str | None = None
    """The tool's."""

    def message(self) -> Message:
        return Message(
            self.role,
            "\n".join(self.texts),
            tool_calls=tuple(self.calls),
            tool_call_id=self.call_id,
            name=self.name,
            reasoning_content="\n".join(self.thoughts) if self.thoughts else None,
        )


class Turns:
    """The dialog so far."""

    def __init__(self) -> None:
        self._turns: list[Turn] = []
        self._names: dict[str, str] = {}

    @property
    def messages(self) -> tuple[Message, ...]:
        return tuple(turn.message() for turn in self._turns)

    @property
    def paths(self) -> tuple[str, ...]:
        """Where each message begins in the body."""
        return tuple(turn.path for turn in self._turns)

    def new(self, role: str, path: str) -> Turn:
        self._turns.append(Turn(role, path))
        return self._turns[-1]

    def same(self, role: str, path: str) -> Turn:
        """The last turn if it is this role's, otherwise a new one."""
        return self._turns[-1] if self._turns and self._turns[-1].role == role else self.new(role, path)

    def call(self, path: str, call_id: str, name: str, arguments: Any) -> None:
        """Add a tool call to the assistant's current turn, or begin one. `arguments`: an object."""
        self.same("assistant", path).calls.append(tool_call(call_id, name, arguments))
        self._names[call_id] = name

    def result(self, path: str, call_id: str, text: str, *, id_name: str) -> None:
        """A tool answers. ApiError, which names the id's field, if it was not called."""
        if (name := self._names.get(call_id)) is None:
            param = f"{path}.{id_name}"
            raise ApiError(400, "invalid_value", f"{param} is not the id of an earlier call; send the call, too", param)
        turn = self.new("tool", path)
        turn.texts, turn.call_id, turn.name = [text], call_id, name
