"""What TorchServe's frontend hands to a handler, and what may be replied to it.

With every reply the frontend is told whether more will follow (`False`), whether it is the last of a stream (`True`) or
a whole answer (`None`). What it makes of that depends on how the request came, of which it says nothing; the headers
give it away. All of this is how 0.12.0 behaves: RestJob.java, GRPCJob.java and ContinuousBatching.java.
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
"""How often a client that waits for a whole answer is looked for once all places are taken."""
RETRY_AFTER_S = 1
"""How long a client that is refused for lack of capacity is told to wait."""

SEQUENCE_ID = "ts_request_sequence_id"

_PHRASES = {status.value: status.phrase for status in HTTPStatus}


class Transport(Enum):
    """How a request came."""

    HTTP = auto()
    """Any number of replies. Only while a stream goes on does the frontend notice that the client has gone."""
    GRPC = auto()
    """Predictions or StreamPredictions: exactly one reply, which has to be the last of a stream. After any other the
    frontend forgets the request, or fails and takes the worker with it."""
    GRPC_SEQUENCE = auto()
    """StreamPredictions2: no reply. The frontend has failed the call already, and a reply that comes after the client
    has closed its side ends the worker for good."""


@dataclass(slots=True)
class Exchange:
    """A request that the frontend waits for, and how far its answer is."""

    transport: Transport
    takes_chunks: bool
    """Whether its answer may be sent in chunks although it does not stream."""
    has_begun: bool = False
    """Status and headers are sent."""
    next_probe: float = 0.0

    @classmethod
    def of(cls, headers: Mapping[str, object]) -> Exchange:
        """From the headers as TorchServe gives them: text, but a dict for what is a parameter of the request."""
        sent = {name.lower(): value for name, value in headers.items() if isinstance(value, str)}
        if not sent:
            return cls(Transport.GRPC, takes_chunks=False)
        if SEQUENCE_ID in sent and "content-length" not in sent:  # the frontend adds one where HTTP has none
            return cls(Transport.GRPC_SEQUENCE, takes_chunks=False)
        # HTTP/1.0 knows no chunks. The frontend does not say which version it is, but 1.1 always has a host.
        return cls(Transport.HTTP, takes_chunks="host" in sent)

    def is_due(self, now: float) -> bool:
        """Whether to look for the client; if so, the next time is set."""
        if not self.takes_chunks or now < self.next_probe:
            return False
        self.next_probe = now + PROBE_S
        return True

    def stop(self, reply: Reply) -> bool | None:
        """What the frontend has to be told with a reply."""
        if not reply.is_last:
            return False
        return True if self.has_begun or self.transport is Transport.GRPC else None

    def body(self, reply: Reply) -> bytes:
        """What the client gets. gRPC drops an answer's status, so there an error names it."""
        if reply.status < 400 or self.transport is not Transport.GRPC:
            return reply.body
        answer = json.loads(reply.body)
        answer["error"]["status"] = reply.status
        return json.dumps(answer).encode()


def body_in(parameters: Mapping[str, object], transport: Transport) -> object:
    """The body among a request's parameters. ApiError if it was sent in pieces, of which some would be overlooked.

    An HTTP body is the parameter `body`. Form fields, the query of some routes, and gRPC's `input` are parameters, too;
    `data` is what TorchServe's own gRPC client calls the one it sends.
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
        """Indices of the requests that this call has no reply to, by id, in the order of arrival."""
        self._data = data
        self._context = context
        self._bodies = [b""] * len(data)
        self._stops: list[bool | None] = [None] * len(data)

    def headers(self, request_id: str) -> Mapping[str, object]:
        """Those of the request, and a dict for each of its parameters."""
        headers: Mapping[str, object] = self._context.get_all_request_header(self.unanswered[request_id])
        return headers

    def parameters(self, request_id: str) -> Mapping[str, object]:
        """What was sent, when the request appears for the first time."""
        return self._data[self.unanswered[request_id]]

    def reply(self, reply: Reply, exchange: Exchange) -> None:
        """Have it sent, at most one for each request."""
        index = self.unanswered.pop(reply.request_id)
        self._bodies[index], self._stops[index] = exchange.body(reply), exchange.stop(reply)
        exchange.has_begun = True
        context = self._context
        context.set_response_status(code=reply.status, phrase=_PHRASES.get(reply.status, ""), idx=index)
        context.set_response_content_type(index, reply.content_type)
        if reply.status in (429, 503):
            context.set_response_header(index, "retry-after", str(RETRY_AFTER_S))

    def finish(self) -> list[bytes]:
        """What handle() returns. A request without a reply is left out, which makes it come again."""
        for index in self.unanswered.values():
            del self._context.request_ids[index]
        self._context.stopping_criteria = [lambda _reply, stop=stop: stop for stop in self._stops]
        return self._bodies
