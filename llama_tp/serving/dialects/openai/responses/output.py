"""The items of a response's output."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

from llama_tp.serving.dialects.tools import call_id

Event = tuple[str, dict[str, Any]]
"""Its name and its other fields, without the number."""


class Item(ABC):
    """An item that grows. Its ids are the same in a stream and in the whole answer."""

    delta_name: ClassVar[str]
    """Of the events by which it grows."""
    prefix: ClassVar[str]
    """Of its id."""

    def __init__(self, request_id: str, index: int) -> None:
        """`index`: its place in the output."""
        self.index = index
        self.id = call_id(self.prefix, request_id, call=index)
        self._pieces: list[str] = []

    def add(self, piece: str) -> None:
        self._pieces.append(piece)

    @property
    def text(self) -> str:
        """The text of a message, or the arguments of a call."""
        return "".join(self._pieces)

    @property
    def place(self) -> dict[str, Any]:
        """Where the item's content is, in events."""
        return {"item_id": self.id, "output_index": self.index}

    @abstractmethod
    def fields(self, status: str) -> dict[str, Any]:
        """The item, ready for JSON."""

    def opening(self) -> Iterator[Event]:
        """The events that announce it."""
        yield "response.output_item.added", {"output_index": self.index, "item": self.fields("in_progress")}

    def closing(self, status: str) -> Iterator[Event]:
        """The events that repeat it when it is whole."""
        yield "response.output_item.done", {"output_index": self.index, "item": self.fields(status)}


class Text(Item):
    """A message, which has one part."""

    delta_name = "response.output_text.delta"
    prefix = "msg_"

    @property
    def place(self) -> dict[str, Any]:
        return {**super().place, "content_index": 0}

    def fields(self, status: str) -> dict[str, Any]:
        content = [] if status == "in_progress" else [self._part(self.text)]
        return {"type": "message", "id": self.id, "status": status, "role": "assistant", "content": content}

    def opening(self) -> Iterator[Event]:
        yield from super().opening()
        yield "response.content_part.added", {**self.place, "part": self._part("")}

    def closing(self, status: str) -> Iterator[Event]:
        text = self.text
        yield "response.output_text.done", {**self.place, "text": text, "logprobs": []}
        yield "response.content_part.done", {**self.place, "part": self._part(text)}
        yield from super().closing(status)

    def _part(self, text: str) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


class FunctionCall(Item):
    """A call of a function."""

    delta_name = "response.function_call_arguments.delta"
    prefix = "fc_"

    def __init__(self, request_id: str, index: int, call: int, name: str) -> None:
        """`call`: which of the answer's calls it is."""
        super().__init__(request_id, index)
        self._name = name
        self._call_id = call_id("call_", request_id, call=call)

    def fields(self, status: str) -> dict[str, Any]:
        return {
            "type": "function_call",
            "id": self.id,
            "call_id": self._call_id,
            "name": self._name,
            "arguments": self.text,
            "status": status,
        }

    def closing(self, status: str) -> Iterator[Event]:
        fields = {**self.place, "name": self._name, "arguments": self.text}
        yield "response.function_call_arguments.done", fields
        yield from super().closing(status)
