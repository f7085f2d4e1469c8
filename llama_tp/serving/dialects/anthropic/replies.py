"""Formats the replies to a request to v1/messages: one message, or a stream of its events.

The events of a stream: message_start, then for each block content_block_start, content_block_delta ...,
content_block_stop, then message_delta, message_stop. A chunk without news is a ping.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from llama_tp.engine.request import FinishReason
from llama_tp.serving.dialects.anthropic.errors import error_body, error_fields
from llama_tp.serving.dialects.base import Accepted
from llama_tp.serving.dialects.events import event
from llama_tp.serving.dialects.tools import call_id
from llama_tp.serving.encoding import to_json
from llama_tp.serving.errors import ApiError
from llama_tp.serving.generation import OutputDelta, Usage
from llama_tp.serving.reply_size import check_answer, chunk_tokens
from llama_tp.text.tools.calls import ToolCall, ToolCallDelta, whole_calls

_PING = event("ping", {})
_TEXT = -1
"""The open block, if it is one of text; otherwise it is the number of the call."""


class MessageReplies:
    """The Replies to one request, which has one output."""

    chunk_type = "text/event-stream"

    def __init__(self, accepted: Accepted, model_name: str, longest_token: int) -> None:
        self.chunk_tokens = chunk_tokens(accepted.request, longest_token)
        self._request_id = accepted.id
        self._num_prompt = len(accepted.prompts[0])
        self._message: dict[str, Any] = {
            "id": f"msg_{accepted.id}",
            "type": "message",
            "role": "assistant",
            "model": model_name,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
        }
        self._has_begun = False
        self._index = -1
        """Of the block that was opened last."""
        self._open: int | None = None
        self._has_calls = False
        self._before = self._after = b""
        """Of a delta's text in an event: the events of a block are otherwise the same."""

    def chunk(self, deltas: Sequence[OutputDelta], usage: Usage | None) -> bytes:
        (delta,) = deltas
        if delta.error is not None:
            raise delta.error
        events = [] if self._has_begun else [*self._opening()]
        if delta.text:
            if self._open != _TEXT:
                events += self._begin(_TEXT, {"type": "text", "text": ""}, "text_delta", "text")
            events.append(self._before + to_json(delta.text) + self._after)
        for call in delta.tool_calls:
            events += self._call(call)
        if usage is not None:
            events += self._closing(delta, usage)
        self._has_begun = True  # not earlier: a chunk that cannot be built is not sent
        return b"".join(events) or _PING

    def answer(self, outputs: Sequence[OutputDelta], usage: Usage) -> bytes:
        (output,) = outputs
        if output.error is not None:
            raise output.error
        content: list[dict[str, Any]] = [{"type": "text", "text": output.text}] if output.text else []
        for at, call in enumerate(whole_calls(output.tool_calls)):
            content.append({**self._tool_use(at, call.name), "input": _input(call)})
        self._has_calls = bool(output.tool_calls)
        message = {**self._message, "content": content, **self._stop(output), "usage": _usage(usage)}
        body = to_json(message) + b"\n"
        check_answer(body)
        return body

    def error(self, error: ApiError) -> bytes:
        """An object, or an event at the end of a stream that fails after its status was sent."""
        return event("error", error_fields(error)) if self._has_begun else error_body(error)

    def _opening(self) -> Iterator[bytes]:
        usage = _usage(Usage(self._num_prompt, 0))  # what the cache holds is known at the end
        yield event("message_start", {"message": {**self._message, "usage": usage}})
        yield _PING

    def _begin(self, block: int, content: dict[str, Any], kind: str, key: str) -> Iterator[bytes]:
        """The end of the last block and the beginning of a new one."""
        yield from self._end()
        self._open = block
        self._index += 1
        yield event("content_block_start", {"index": self._index, "content_block": content})
        before = event("content_block_delta", {"index": self._index, "delta": {"type": kind, key: ""}})
        self._before, _, after = before.rpartition(b'""')
        self._after = after

    def _end(self) -> Iterator[bytes]:
        if self._open is not None:
            yield event("content_block_stop", {"index": self._index})
        self._open = None

    def _call(self, delta: ToolCallDelta) -> Iterator[bytes]:
        if delta.name is not None:
            self._has_calls = True
            content = {**self._tool_use(delta.index, delta.name), "input": {}}
            yield from self._begin(delta.index, content, "input_json_delta", "partial_json")
        assert self._open == delta.index, "a call's deltas follow each other"
        if delta.arguments:
            yield self._before + to_json(delta.arguments) + self._after

    def _tool_use(self, at: int, name: str) -> dict[str, Any]:
        return {"type": "tool_use", "id": call_id("toolu_", self._request_id, call=at), "name": name}

    def _closing(self, delta: OutputDelta, usage: Usage) -> Iterator[bytes]:
        yield from self._end()
        yield event("message_delta", {"delta": self._stop(delta), "usage": _usage(usage)})
        yield event("message_stop", {})

    def _stop(self, delta: OutputDelta) -> dict[str, str | None]:
        reason = "end_turn"
        if delta.finish_reason is not FinishReason.STOP:
            reason = "max_tokens"
        elif delta.stop_string is not None:
            reason = "stop_sequence"
        elif self._has_calls:
            reason = "tool_use"
        return {"stop_reason": reason, "stop_sequence": delta.stop_string}


def _input(call: ToolCall) -> dict[str, Any]:
    """The arguments of a call. Those that are no JSON object, as when the answer was cut off, are returned as
    Anthropic's guide to fine-grained tool streaming has it."""
    try:
        arguments = json.loads(call.arguments or "{}")
    except (ValueError, RecursionError):
        arguments = None
    return arguments if isinstance(arguments, dict) else {"INVALID_JSON": call.arguments}


def _usage(usage: Usage) -> dict[str, int]:
    """Anthropic's input_tokens are those that no cache held."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    }
