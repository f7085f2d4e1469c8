"""Reads one call, a JSON object with a name and arguments, while its text arrives."""

from __future__ import annotations

import json

from llama_tp.text.tools.calls import ToolCallDelta

_ARGUMENTS = ("arguments", "parameters")
_WHITESPACE = " \t\r\n"


class CallScanner:
    """Takes the text from the object's brace on. The arguments are passed on as they are written, once the name is
    known."""

    def __init__(self, index: int) -> None:
        """index: of the call in its answer."""
        self.name: str | None = None
        self.is_complete = False
        """Whether the object has ended."""
        self.is_broken = False
        """Whether this is no call: no JSON, or without a name."""
        self._index = index
        self._text = ""
        self._depth = 0
        self._in_string = False
        self._is_escaped = False
        self._key: str | None = None
        self._begin = -1  # of the key or value being read
        self._is_value = False
        self._arguments = ""  # not yet passed on
        self._is_announced = False

    @property
    def text(self) -> str:
        """All of the object's text so far."""
        return self._text

    def push(self, text: str) -> str:
        """Read on. Returns what follows the object, if it has ended."""
        start = len(self._text)
        self._text += text
        for at in range(start, len(self._text)):
            self._read(self._text[at], at)
            if self.is_complete or self.is_broken:
                self._text, rest = self._text[: at + 1], self._text[at + 1 :]
                return rest
        return ""

    def take(self) -> list[ToolCallDelta]:
        """The new content of the call. Empty before its name is known."""
        if self.name is None or self.is_broken:
            return []
        if not self._is_announced:
            self._is_announced = True
            pieces, self._arguments = self._arguments, ""
            return [ToolCallDelta(self._index, pieces, self.name)]
        if not self._arguments:
            return []
        pieces, self._arguments = self._arguments, ""
        return [ToolCallDelta(self._index, pieces)]

    def _read(self, char: str, at: int) -> None:
        if self._in_string:
            self._read_in_string(char, at)
        elif char == '"':
            self._in_string = True
            self._begin_part(at)
        elif char in "{[":
            self._depth += 1
            if self._depth > 1:
                self._begin_part(at)
        elif char in "}]":
            self._close(char, at)
        elif self._depth == 1 and char == ",":
            self._end_value(at)
        elif self._depth == 1 and char == ":":
            self._is_value = self._key is not None
            self.is_broken |= self._key is None
        elif char not in _WHITESPACE:
            self.is_broken |= self._depth == 0
            self._begin_part(at)
        if self._streams_arguments and self._begin >= 0 and not self.is_complete:
            self._arguments += char

    @property
    def _streams_arguments(self) -> bool:
        """Whether the text being read is the arguments' object. Arguments as a JSON string are passed on at their
        end."""
        return self._is_value and self._key in _ARGUMENTS and self._begin >= 0 and self._text[self._begin] not in '"n'

    def _begin_part(self, at: int) -> None:
        if self._begin < 0:
            self._begin = at

    def _read_in_string(self, char: str, at: int) -> None:
        if self._is_escaped:
            self._is_escaped = False
        elif char == "\\":
            self._is_escaped = True
        elif char == '"':
            self._in_string = False
            if self._depth == 1 and not self._is_value:
                self._key = self._parsed(at + 1)
                self._begin = -1

    def _close(self, char: str, at: int) -> None:
        if self._depth == 1:
            self._end_value(at)
            self.is_complete = char == "}" and self.name is not None
            self.is_broken |= not self.is_complete
            if self.is_complete and not self._is_announced and not self._arguments:
                self._arguments = "{}"
        self._depth -= 1

    def _end_value(self, end: int) -> None:
        """A value of the call has ended before `end`."""
        if not self._is_value or self._begin < 0:
            self.is_broken |= self._begin >= 0
            return
        if self._key == "name":
            name = self._parsed(end)
            self.is_broken |= not isinstance(name, str)
            self.name = name if isinstance(name, str) else None
        elif self._key in _ARGUMENTS and not self._streams_arguments:
            arguments = self._parsed(end)
            self._arguments = arguments if isinstance(arguments, str) and arguments.strip() else "{}"
        self._key, self._begin, self._is_value = None, -1, False

    def _parsed(self, end: int) -> str | None:
        """The string or null that was read."""
        try:
            value = json.loads(self._text[self._begin : end])
        except ValueError:
            self.is_broken = True
            return None
        return value if isinstance(value, str) else None
