"""Formats the replies to a request to v1/responses: one response, or a stream of its events.

The events of a stream: response.created, response.in_progress, then for each item of the output
response.output_item.added, its deltas, response.output_item.done, then response.completed or response.incomplete. The
last events repeat the whole answer, so they may be larger than a chunk. A chunk without news is a comment.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

from llama_tp.engine.request import FinishReason
from llama_tp.serving.dialects.base import Accepted
from llama_tp.serving.dialects.events import event
from llama_tp.serving.dialects.openai.logprobs import TokenNames, chat_logprobs
from llama_tp.serving.dialects.openai.responses.output import FunctionCall, Item, Text
from llama_tp.serving.encoding import to_json
from llama_tp.serving.errors import ApiError
from llama_tp.serving.generation import OutputDelta, Usage
from llama_tp.serving.reply_size import check_answer, chunk_tokens
from llama_tp.text.tokenizer import Tokenizer
from llama_tp.text.tools.calls import ToolCallDelta

_COMMENT = b":\n\n"
_COMPLETED, _INCOMPLETE = "completed", "incomplete"


class ResponseReplies:
    """The Replies to one request, which has one output."""

    chunk_type = "text/event-stream"

    def __init__(self, accepted: Accepted, model_name: str, tokenizer: Tokenizer, longest_token: int) -> None:
        self.chunk_tokens = chunk_tokens(accepted.request, longest_token)
        self._id = accepted.id
        self._names = TokenNames(tokenizer)
        self._created = int(time.time())
        self._model_name = model_name
        self._echoed = accepted.request.reply.echoed
        self._has_begun = False
        self._num_events = 0
        self._items: list[Item] = []
        self._before = b""
        """Of an event of the last item's growth, up to the number."""

    def chunk(self, deltas: Sequence[OutputDelta], usage: Usage | None) -> bytes:
        (delta,) = deltas
        if delta.error is not None:
            raise delta.error
        events = [] if self._has_begun else [*self._opening()]
        is_empty = usage is not None and not self._items
        if delta.text or (not delta.tool_calls and (is_empty or delta.logprobs)):
            events += self._text(delta)
        for call in delta.tool_calls:
            events += self._call(call)
        if usage is not None:
            events += self._closing(delta, usage)
        self._has_begun = True  # not earlier: a chunk that cannot be built is not sent
        return b"".join(events) or _COMMENT

    def answer(self, outputs: Sequence[OutputDelta], usage: Usage) -> bytes:
        (output,) = outputs
        if output.error is not None:
            raise output.error
        if output.text or not output.tool_calls:
            self._items.append(Text(self._id, 0))
            self._items[-1].add(output.text)
        for call in output.tool_calls:
            self._item_of(call).add(call.arguments)
        status = _status(output)
        response = self._response(status, usage)
        if output.logprobs is not None and isinstance(self._items[0], Text):
            response["output"][0]["content"][0]["logprobs"] = self._logprobs(output)
        body = to_json(response) + b"\n"
        check_answer(body)
        return body

    def error(self, error: ApiError) -> bytes:
        """An object, or the events at the end of a stream that fails after its status was sent."""
        if not self._has_begun:
            return error.body() + b"\n"
        fields = {"code": error.code, "message": error.message, "param": error.param}
        kind = "rate_limit_exceeded" if error.status == 429 else "server_error"
        response = self._response("failed", None)
        response["error"] = {"code": kind, "message": error.message}
        return self._event("error", fields) + self._event("response.failed", {"response": response})

    def _event(self, name: str, fields: dict[str, Any]) -> bytes:
        return _prefix(name, fields) + self._next_number() + b"}\n\n"

    def _next_number(self) -> bytes:
        self._num_events += 1
        return b"%d" % (self._num_events - 1)

    def _opening(self) -> Iterator[bytes]:
        response = self._response("in_progress", None)
        yield self._event("response.created", {"response": response})
        yield self._event("response.in_progress", {"response": response})

    def _text(self, delta: OutputDelta) -> Iterator[bytes]:
        if not self._items or not isinstance(self._items[-1], Text):
            yield from self._end(_COMPLETED)
            item = Text(self._id, len(self._items))
            self._items.append(item)
            yield from self._begin(item)
        yield from self._delta(delta.text, self._logprobs(delta))

    def _call(self, delta: ToolCallDelta) -> Iterator[bytes]:
        if delta.name is not None:
            yield from self._end(_COMPLETED)
            yield from self._begin(self._item_of(delta))
        if delta.arguments:
            yield from self._delta(delta.arguments, [])

    def _item_of(self, delta: ToolCallDelta) -> Item:
        if delta.name is not None:
            self._items.append(FunctionCall(self._id, len(self._items), delta.index, delta.name))
        return self._items[-1]

    def _begin(self, item: Item) -> Iterator[bytes]:
        for name, fields in item.opening():
            yield self._event(name, fields)
        self._before = _prefix(item.delta_name, item.place)

    def _delta(self, text: str, logprobs: list[Any]) -> Iterator[bytes]:
        item = self._items[-1]
        item.add(text)
        after = b""
        if isinstance(item, Text):
            after = b',"logprobs":' + to_json(logprobs) if logprobs else b',"logprobs":[]'
        yield self._before + self._next_number() + b',"delta":' + to_json(text) + after + b"}\n\n"

    def _end(self, status: str) -> Iterator[bytes]:
        """The item that was begun last is whole."""
        for item in self._items[-1:]:
            for name, fields in item.closing(status):
                yield self._event(name, fields)

    def _closing(self, delta: OutputDelta, usage: Usage) -> Iterator[bytes]:
        status = _status(delta)
        yield from self._end(status)
        yield self._event(f"response.{status}", {"response": self._response(status, usage)})

    def _logprobs(self, delta: OutputDelta) -> list[Any]:
        if delta.logprobs is None:
            return []
        content: list[Any] = chat_logprobs(delta.ids, delta.logprobs, self._names)["content"]
        return content

    def _response(self, status: str, usage: Usage | None) -> dict[str, Any]:
        """The response so far. Its last item has the same status, if it has ended."""
        last = status if status == _COMPLETED else _INCOMPLETE
        output = [item.fields(_COMPLETED) for item in self._items[:-1]]
        output += [item.fields(last) for item in self._items[-1:]]
        return {
            "id": f"resp_{self._id}",
            "object": "response",
            "created_at": self._created,
            "completed_at": int(time.time()) if status == _COMPLETED else None,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == _INCOMPLETE else None,
            "model": self._model_name,
            "output": output,
            "usage": None if usage is None else _usage(usage),
            **self._echoed,
        }


def _prefix(name: str, fields: dict[str, Any]) -> bytes:
    """An event up to its number, in which it differs from all others."""
    return event(name, fields).removesuffix(b"}\n\n") + b',"sequence_number":'


def _status(output: OutputDelta) -> str:
    return _COMPLETED if output.finish_reason is FinishReason.STOP else _INCOMPLETE


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
