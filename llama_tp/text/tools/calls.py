"""Tool calls in an assistant's answer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """Which tools an answer may or must call."""

    mode: Literal["auto", "none", "required"] = "auto"
    """Whether the model decides, calls nothing, or calls at least one tool."""
    name: str | None = None
    """The one tool that it must call, with mode "required"."""
    parallel: bool = True
    """Whether an answer may have several calls."""


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """New content of one tool call."""

    index: int
    """Which of the answer's calls this belongs to."""
    arguments: str
    """The next piece of its arguments: JSON text, which may be empty."""
    name: str | None = None
    """The tool's name, in the call's first delta only."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A whole tool call."""

    name: str
    arguments: str
    """JSON text."""


def whole_calls(deltas: Iterable[ToolCallDelta]) -> list[ToolCall]:
    """The calls that an answer's deltas add up to."""
    names: list[str] = []
    arguments: list[list[str]] = []
    for delta in deltas:
        if delta.name is not None:
            names.append(delta.name)
            arguments.append([])
        arguments[delta.index].append(delta.arguments)
    return [ToolCall(name, "".join(pieces)) for name, pieces in zip(names, arguments, strict=True)]
