"""Connects the API, the text layer and the engine: bodies in, replies out. Knows no HTTP server and no threads.

`open` a request under an id of the caller's choice, `poll` for replies, `close` it when its client has gone. A request
ends with its last reply. User errors are not raised: they are replies, too.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from time import monotonic

from llama_tp.engine.engine import Engine
from llama_tp.engine.loop import EngineLoop
from llama_tp.engine.request import FinishReason, Request, TokenEvent
from llama_tp.serving.admission import Admission, Limits
from llama_tp.serving.dialects.base import Accepted, Dialect, Replies
from llama_tp.serving.dialects.openai.routes import model_documents, model_operations
from llama_tp.serving.encoding import shown, to_json
from llama_tp.serving.errors import ApiError
from llama_tp.serving.generation import GenerationRequest, RequestDefaults, Usage
from llama_tp.serving.metrics import RequestMetrics, RequestRecord
from llama_tp.serving.openapi import openapi_document
from llama_tp.serving.output import Output
from llama_tp.serving.reply import Reply
from llama_tp.serving.routes import all_dialects
from llama_tp.text.chat import ChatFormat
from llama_tp.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Active:
    """A request that has not had its last reply."""

    request: GenerationRequest
    replies: Replies
    key: str
    """Its id in the engine, never reused: the engine is ahead of us, and late events must not reach another request."""
    num_prompt: int
    outputs: list[Output]
    record: RequestRecord
    num_cached: int = 0

    @property
    def has_ended(self) -> bool:
        return all(output.finish_reason is not None for output in self.outputs)

    @property
    def has_reply(self) -> bool:
        return self.has_ended or (self.request.stream and any(output.has_delta for output in self.outputs))

    @property
    def usage(self) -> Usage:
        return Usage(self.num_prompt, sum(output.num_tokens for output in self.outputs), self.num_cached)


class LlamaService:
    """Serves requests from one engine loop. Not thread-safe: one thread opens, polls and closes.

    `chat` is the model's chat format, or why it has none. `model_name` and `model_version` are those of the URL.
    """

    def __init__(
        self,
        loop: EngineLoop,
        tokenizer: Tokenizer,
        chat: ChatFormat | str,
        defaults: RequestDefaults,
        *,
        model_name: str,
        model_version: str = "1.0",
    ) -> None:
        self._loop = loop
        self._tokenizer = tokenizer
        config = loop.engine.config
        limits = Limits(loop.engine.runner.model.args.vocab_size, config.max_seq_len, config.max_waiting)
        self._longest_token = max(len(tokenizer.token_bytes(token)) for token in range(tokenizer.vocab_size))
        self._admission = Admission(tokenizer, chat, limits, longest_token=self._longest_token)
        self._dialects = all_dialects(defaults, model_name)
        self._documents = model_documents(model_name, config.max_seq_len)
        operations = {route: dialect.operation for route, dialect in self._dialects.items()}
        document = openapi_document({**operations, **model_operations(model_name)}, model_name, model_version)
        self._documents["openapi.json"] = to_json(document) + b"\n"
        self._active: dict[str, _Active] = {}
        self._id_of: dict[str, str] = {}
        self._num_started = 0
        self._immediate: list[Reply] = []
        self.metrics = RequestMetrics()

    @property
    def engine(self) -> Engine:
        return self._loop.engine

    @property
    def open_ids(self) -> set[str]:
        """Requests that were opened and have neither had their last reply nor been closed."""
        return self._active.keys() | {reply.request_id for reply in self._immediate}

    def is_generating(self, request_id: str) -> bool:
        """Whether a request has tokens, but not its last reply."""
        active = self._active.get(request_id)
        return active is not None and any(output.num_tokens for output in active.outputs)

    def open(self, request_id: str, body: object, route: str = "", *, can_stream: bool = True) -> None:
        """Accept a request to a route below the model's own. An error becomes its only reply."""
        if (document := self._documents.get(route)) is not None:
            self._immediate.append(Reply(request_id, document))
            return
        if (dialect := self._dialects.get(route)) is None:
            routes = ", ".join(filter(None, [*self._dialects, *self._documents]))
            message = (
                f"there is no route {shown(route)}; POST to /predictions/<model> itself, or below "
                f"/predictions/<model>/<version>/ to one of: {routes}"
            )
            self.refuse(request_id, ApiError(404, "unknown_route", message))
            return
        try:
            self._start(request_id, dialect, body, can_stream)
        except ApiError as error:
            self.refuse(request_id, error, dialect)
        except Exception as error:
            # The type only: an unexpected error's message may quote user text.
            log.error("parsing request %s failed: %s", request_id, type(error).__name__)
            failure = ApiError(500, "internal_error", "the server failed to read this request")
            self.refuse(request_id, failure, dialect)

    def refuse(self, request_id: str, error: ApiError, dialect: Dialect | None = None) -> None:
        """Answer a request with an error, in the dialect of its route if that is known."""
        log.info("request %s refused: %s", request_id, error)
        self.metrics.failed(error)
        body = dialect.error(error) if dialect else error.body()
        self._immediate.append(Reply(request_id, body, status=error.status))

    def close(self, request_id: str) -> None:
        """The client has gone: stop generating."""
        self._immediate = [reply for reply in self._immediate if reply.request_id != request_id]
        if (active := self._active.pop(request_id, None)) is not None:
            del self._id_of[active.key]
            self._loop.cancel(active.key)
            for output in active.outputs:
                if output.finish_reason is None:
                    active.record.output_ended(FinishReason.CANCELLED)

    def poll(self, timeout_s: float) -> list[Reply]:
        """All pending replies, at most one per request; waits up to timeout_s for the first."""
        deadline = monotonic() + timeout_s
        remaining = 0.0  # refusals are not delayed, but the engine's events are taken every time
        while True:
            if self._active:
                for event in self._loop.poll(remaining):
                    self._dispatch(event)
            replies, self._immediate = self._immediate, []
            replies += [self._safely(key, active) for key, active in list(self._active.items()) if active.has_reply]
            remaining = deadline - monotonic()
            if replies or remaining <= 0 or not self._active:
                return replies

    def _start(self, request_id: str, dialect: Dialect, body: object, can_stream: bool) -> None:
        opened = self.metrics.clock()
        request = dialect.parse(body)
        if request.stream and not can_stream:
            message = "stream=true is possible over HTTP only; leave it out, or POST to /predictions/<model>"
            raise ApiError(400, "stream_not_supported", message, "stream")
        admitted = self._admission.admit(request)
        accepted = Accepted(request_id, request, admitted.prompt)
        replies = dialect.replies(accepted, self._tokenizer, self._longest_token)
        self._num_started += 1
        key = f"{request_id}#{self._num_started}"
        self._id_of[key] = request_id
        continued = admitted.prompt if request.continues_text else []
        outputs = [Output(self._tokenizer, request, index, continued) for index in range(admitted.params.n)]
        record = RequestRecord(self.metrics, len(admitted.prompt), opened)
        self._active[request_id] = _Active(request, replies, key, len(admitted.prompt), outputs, record)
        self._loop.submit(Request(key, tuple(admitted.prompt), admitted.params, request.timeout_s))

    def _dispatch(self, event: TokenEvent) -> None:
        active = self._active.get(self._id_of.get(event.request_id, ""))
        if active is None:
            return  # closed while the engine was ahead of us
        output = active.outputs[event.index]
        if output.finish_reason is not None:
            return  # ended by a stop string while the engine was ahead of us
        active.num_cached += event.num_cached
        output.push(event)
        if event.token_id is not None:
            active.record.token()
        if output.finish_reason is not None:
            cancelled = event.finish_reason is FinishReason.CANCELLED
            active.record.output_ended(FinishReason.CANCELLED if cancelled else output.finish_reason)
        if output.finish_reason is not None and event.finish_reason is None:
            self._loop.cancel(active.key, event.index)  # the engine knows nothing of stop strings

    def _safely(self, request_id: str, active: _Active) -> Reply:
        """The reply, or, if building it fails, an error for this request alone."""
        try:
            return self._reply(request_id, active)
        except ApiError as error:
            self.metrics.failed(error)
            self.close(request_id)
            return Reply(request_id, active.replies.error(error), status=error.status)
        except Exception as error:
            log.error("replying to request %s failed: %s", request_id, type(error).__name__)
            self.close(request_id)
            failure = ApiError(500, "internal_error", "the server failed to build the response")
            self.metrics.failed(failure)
            return Reply(request_id, active.replies.error(failure), status=500)

    def _reply(self, request_id: str, active: _Active) -> Reply:
        """The client's next reply. Ends the request if it is the last. ApiError if the request failed."""
        replies, is_stream = active.replies, active.request.stream
        limit = replies.chunk_tokens if is_stream else active.request.sampling.max_new_tokens
        deltas = [output.next_delta(limit) for output in active.outputs if output.has_delta]
        if not all(output.is_emitted for output in active.outputs):
            return Reply(request_id, replies.chunk(deltas, None), is_last=False, content_type=replies.chunk_type)
        del self._active[request_id]
        del self._id_of[active.key]
        errors = [output.error for output in active.outputs if output.error is not None]
        if len(errors) == len(active.outputs):
            raise errors[0]
        active.record.answered()
        if is_stream:
            return Reply(request_id, replies.chunk(deltas, active.usage), content_type=replies.chunk_type)
        return Reply(request_id, replies.answer(deltas, active.usage))
