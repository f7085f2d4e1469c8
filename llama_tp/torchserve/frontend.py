"""The protocol between TorchServe's frontend and a handler.

Every reply carries a stopping criterion: more will follow (`False`), last of a stream (`True`), or a whole answer
(`None`). Its effect depends on the request's transport, which the frontend does not report; it is inferred from the
headers. Describes 0.12.0: RestJob.java, GRPCJob.java and ContinuousBatching.java.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from http import HTTPStatus
from typing import Any

from llama_tp.serving.encoding import shown
from llama_tp.serving.errors import ApiError
from llama_tp.serving.reply import Reply

PROBE_S = 1.0
"""Interval of checks for a client that waits for a whole answer, once all slots are taken."""
RETRY_AFTER_S = 1
"""Retry-After for a client rejected for lack of capacity."""

SEQUENCE_ID = "ts_request_sequence_id"

_PHRASES = {status.value: status.phrase for status in HTTPStatus}


class Transport(Enum):
    """How a request arrived."""

    HTTP = auto()
    """Any number of replies. The frontend notices a disconnected client only during a stream."""
    GRPC = auto()
    """Predictions or StreamPredictions: exactly one reply, which must be marked as the last of a stream. After any
    other the frontend forgets the request, or fails and takes the worker down."""
    GRPC_SEQUENCE = auto()
    """StreamPredictions2: no reply. The frontend has already failed the call, and a reply after the client has closed
    its side ends the worker permanently."""


@dataclass(slots=True)
class Exchange:
    """A pending request, and the state of its answer."""

    transport: Transport
    takes_chunks: bool
    """Whether its answer may be sent in chunks although it does not stream."""
    has_begun: bool = False
    """Status and headers have been sent."""
    next_probe: float = 0.0

    @classmethod
    def of(cls, headers: Mapping[str, object]) -> Exchange:
        """From TorchServe's headers: text values, and dicts for request parameters."""
        sent = {name.lower(): value for name, value in headers.items() if isinstance(value, str)}
        if not sent:
            return cls(Transport.GRPC, takes_chunks=False)
        if SEQUENCE_ID in sent and "content-length" not in sent:  # for HTTP the frontend adds one
            return cls(Transport.GRPC_SEQUENCE, takes_chunks=False)
        # HTTP/1.0 has no chunks. The frontend does not report the version, but 1.1 always has a Host header.
        return cls(Transport.HTTP, takes_chunks="host" in sent)

    def is_due(self, now: float) -> bool:
        """Whether to check for the client now; if so, schedules the next check."""
        if not self.takes_chunks or now < self.next_probe:
            return False
        self.next_probe = now + PROBE_S
        return True

    def stop(self, reply: Reply) -> bool | None:
        """The stopping criterion to send with a reply."""
        if not reply.is_last:
            return False
        return True if self.has_begun or self.transport is Transport.GRPC else None

    def body(self, reply: Reply) -> bytes:
        """The body for the client. gRPC drops the status, so error bodies include it."""
        if reply.status < 400 or self.transport is not Transport.GRPC:
            return reply.body
        answer = json.loads(reply.body)
        answer["error"]["status"] = reply.status
        return json.dumps(answer).encode()


def body_in(parameters: Mapping[str, object], transport: Transport) -> object:
    """The body among a request's parameters. ApiError if there are several, because some would be ignored.

    An HTTP body is the parameter `body`. Form fields, the query of some routes, and gRPC's `input` are also parameters;
    TorchServe's own gRPC client sends `data`.
    """
    bodies = [name for name in ("body", "data") if name in parameters]
    others = [name for name in parameters if name not in ("body", "data", "model_name")]
    if len(bodies) == 1 and not others:
        return parameters[bodies[0]]
    if transport is Transport.GRPC:
        given = f"input has the keys {', '.join(map(shown, parameters))}" if parameters else "input is empty"
        raise ApiError(
            400, "invalid_input", f'{given}; send the whole JSON object as bytes under the key "data"', "input"
        )
    remedy = "send JSON, such as curl -T FILE, or curl -H 'Content-Type: application/json' -d '{...}'"
    raise ApiError(415, "form_not_supported", f"the body was sent as a form or a query; {remedy}")


class Batch:
    """The requests of one handle() call, and the replies to them."""

    def __init__(self, data: list[dict[str, Any]], context: Any) -> None:
        self.unanswered = {request_id: index for index, request_id in context.request_ids.items()}
        """Index by id of the requests without a reply in this call, in order of arrival."""
        self._data = data
        self._context = context
        self._bodies = [b""] * len(data)
        self._stops: list[bool | None] = [None] * len(data)

    def headers(self, request_id: str) -> Mapping[str, object]:
        """The request's headers, and a dict for each of its parameters."""
        headers: Mapping[str, object] = self._context.get_all_request_header(self.unanswered[request_id])
        return headers

    def parameters(self, request_id: str) -> Mapping[str, object]:
        """The request's parameters, sent only the first time it appears."""
        return self._data[self.unanswered[request_id]]

    def reply(self, reply: Reply, exchange: Exchange) -> None:
        """Send a reply, at most one per request."""
        index = self.unanswered.pop(reply.request_id)
        self._bodies[index], self._stops[index] = exchange.body(reply), exchange.stop(reply)
        exchange.has_begun = True
        context = self._context
        context.set_response_status(code=reply.status, phrase=_PHRASES.get(reply.status, ""), idx=index)
        context.set_response_content_type(index, reply.content_type)
        for name, value in reply.headers.items():
            context.set_response_header(index, name, value)
        if reply.status in (429, 503):
            context.set_response_header(index, "retry-after", str(RETRY_AFTER_S))

    def finish(self) -> list[bytes]:
        """The return value of handle(). Requests without a reply are omitted, so the frontend sends them again."""
        for index in self.unanswered.values():
            del self._context.request_ids[index]
        self._context.stopping_criteria = [lambda _reply, stop=stop: stop for stop in self._stops]
        return self._bodies
