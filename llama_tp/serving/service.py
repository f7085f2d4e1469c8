"""Connects the API, the text layer and the engine: bodies in, replies out. Knows no HTTP server and no threads.

`open` a request under an id of the caller's choice, `poll` for replies, `close` it when its client has gone. A request
ends with its last reply. User errors are not raised: they are replies, too.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from time import monotonic

from llama_tp.engine.engine import Engine
from llama_tp.engine.loop import EngineLoop
from llama_tp.engine.request import FinishReason, Request, TokenEvent
from llama_tp.serving.access import Access
from llama_tp.serving.admission import NO_TOOLS, Admission, Limits
from llama_tp.serving.dialects.base import Accepted, Dialect, Replies
from llama_tp.serving.encoding import shown
from llama_tp.serving.errors import ApiError
from llama_tp.serving.generation import GenerationRequest, RequestDefaults, Usage
from llama_tp.serving.metrics import RequestMetrics, RequestRecord
from llama_tp.serving.output import Output
from llama_tp.serving.reply import Reply
from llama_tp.serving.reply_size import chunk_outputs, cut_size
from llama_tp.serving.request_log import CLIENT_GONE, UNKNOWN, log_ended, log_short
from llama_tp.serving.routes import Routes
from llama_tp.text.chat import ChatFormat
from llama_tp.text.detokenizer import bytes_with_specials
from llama_tp.text.tokenizer import Tokenizer
from llama_tp.text.tools.choose import Tools

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Active:
    """A request that has not had its last reply."""

    route: str
    request: GenerationRequest
    replies: Replies
    keys: list[str]
    """The ids of its prompts in the engine, never reused: the engine is ahead of us, and late events must not reach
    another request."""
    num_prompt: int
    """Tokens of all prompts."""
    outputs: list[Output]
    """Output i of prompt k is at k * n + i."""
    chunk_outputs: int
    """Maximum outputs per message of a stream."""
    record: RequestRecord
    num_cached: int = 0
    unsent: bytes = b""
    """The rest of a stream's chunk that has more than MAX_CHUNK_BYTES."""

    @property
    def has_ended(self) -> bool:
        return all(output.finish_reason is not None for output in self.outputs)

    @property
    def has_reply(self) -> bool:
        if self.has_ended or self.unsent:
            return True
        return self.request.stream and any(output.has_delta for output in self.outputs)

    def outputs_of(self, prompt: int) -> list[Output]:
        n = self.request.sampling.n
        return self.outputs[prompt * n : (prompt + 1) * n]

    @property
    def usage(self) -> Usage:
        return Usage(self.num_prompt, sum(output.num_tokens for output in self.outputs), self.num_cached)


class LlamaService:
    """Serves requests from one engine loop. Not thread-safe: one thread opens, polls and closes.

    `chat` is the model's chat format, or why it has none; `tools` likewise. `model_name` and `model_version` are those
    of the URL, `served_name` is its name in answers, and either name may be in requests. `access`: who may send
    requests; None: everybody.
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
        tools: Tools | str = NO_TOOLS,
        served_name: str | None = None,
        access: Access | None = None,
    ) -> None:
        self._loop = loop
        self._tokenizer = tokenizer
        config = loop.engine.config
        limits = Limits(loop.engine.runner.model.args.vocab_size, config.max_seq_len, config.max_waiting)
        tokens, piece = range(tokenizer.vocab_size), bytes_with_specials(tokenizer)
        longest_token = max(len(tokenizer.token_bytes(token)) for token in tokens)
        self._admission = Admission(tokenizer, chat, limits, longest_token=longest_token, tools=tools)
        self._longest_token = max(len(piece(token)) for token in tokens)  # special or not
        names = (served_name or model_name, model_name)
        self._routes = Routes.of(defaults, names, max_seq_len=config.max_seq_len, model_version=model_version)
        self._access = access
        self._is_draining = self._is_opening = False
        self._active: dict[str, _Active] = {}
        self._prompt_of: dict[str, tuple[str, int]] = {}  # key in the engine -> request, and which of its prompts
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

    @property
    def is_idle(self) -> bool:
        """Whether no request is open. Any thread may ask."""
        return not (self._is_opening or self._active or self._immediate)

    def drain(self) -> None:
        """Refuse new requests from now on; open ones go on. Any thread may call it, and then wait for `is_idle`."""
        self._is_draining = True

    def is_generating(self, request_id: str) -> bool:
        """Whether a request has tokens, but not its last reply."""
        active = self._active.get(request_id)
        return active is not None and any(output.num_tokens for output in active.outputs)

    def open(
        self,
        request_id: str,
        body: object,
        route: str = "",
        *,
        can_stream: bool = True,
        credentials: str | None = None,
    ) -> None:
        """Accept a request to a route below the model's own. An error becomes its only reply. `credentials`: the API
        key that it came with."""
        self._is_opening = True  # before looking whether to drain: otherwise `is_idle` could be a moment too early
        try:
            self._check(credentials, route)
            self._open(request_id, body, route, can_stream)
        except ApiError as error:
            self.refuse(request_id, error, route)
        except Exception as error:
            # The type only: an unexpected error's message may quote user text.
            log.error("parsing request %s failed: %s", request_id, type(error).__name__)
            self.refuse(request_id, ApiError(500, "internal_error", "the server failed to read this request"), route)
        finally:
            self._is_opening = False

    def refuse(self, request_id: str, error: ApiError, route: str = "") -> None:
        """Answer a request with an error, in the dialect of its route."""
        dialect = self._routes.dialects.get(route) or self._routes.queries.get(route)
        log_short(request_id, route if route in self._routes else UNKNOWN, error.status, error.code)
        self.metrics.failed(error)
        body = dialect.error(error) if dialect else error.body()
        self._immediate.append(Reply(request_id, body, status=error.status))

    def close(self, request_id: str) -> None:
        """The client has gone: stop generating."""
        self._immediate = [reply for reply in self._immediate if reply.request_id != request_id]
        if (active := self._active.get(request_id)) is not None:
            self._log(request_id, active, CLIENT_GONE, FinishReason.CANCELLED.value)
            self._cancel(request_id)

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

    def _check(self, credentials: str | None, route: str) -> None:
        """ApiError if no request, or not this one, is accepted."""
        if self._access is not None:
            self._access.check(credentials, route)
        if self._is_draining:
            raise ApiError(503, "shutting_down", "the server is shutting down; send the request to another server")

    def _open(self, request_id: str, body: object, route: str, can_stream: bool) -> None:
        if (document := self._routes.documents.get(route)) is not None:
            log_short(request_id, route, 200, "ok")
            self._immediate.append(document.reply(request_id))
        elif (dialect := self._routes.dialects.get(route)) is not None:
            self._start(request_id, route, dialect, body, can_stream)
        elif (query := self._routes.queries.get(route)) is not None:
            answer = query.answer(body, self._admission)
            log_short(request_id, route, 200, "ok")
            self._immediate.append(Reply(request_id, answer))
        else:
            routes = ", ".join(filter(None, self._routes))
            message = (
                f"there is no route {shown(route)}; POST to /predictions/<model> itself, or below "
                f"/predictions/<model>/<version>/ to one of: {routes}"
            )
            raise ApiError(404, "unknown_route", message)

    def _start(self, request_id: str, route: str, dialect: Dialect, body: object, can_stream: bool) -> None:
        opened = self.metrics.clock()
        request = dialect.parse(body)
        if request.stream and not can_stream:
            message = "stream=true is possible over HTTP only; leave it out, or POST to /predictions/<model>"
            raise ApiError(400, "stream_not_supported", message, "stream")
        admitted = self._admission.admit(request)
        prompts = [one.prompt for one in admitted]
        accepted = Accepted(request_id, request, prompts)
        replies = dialect.replies(accepted, self._tokenizer, self._longest_token)
        self._num_started += 1
        keys = [f"{request_id}#{self._num_started}"]
        if len(admitted) > 1:
            keys = [f"{keys[0]}.{index}" for index in range(len(admitted))]
        self._prompt_of |= {key: (request_id, index) for index, key in enumerate(keys)}
        outputs = [
            Output(
                self._tokenizer,
                request,
                index,
                prompts[index // request.sampling.n] if request.continues_text else [],
                self._admission.tool_parser(request),
            )
            for index in range(request.sampling.n * len(prompts))
        ]
        num_prompt = sum(map(len, prompts))
        record = RequestRecord(self.metrics, num_prompt, opened)
        most = chunk_outputs(request, max(map(self._num_bytes, prompts)) if request.reply.echo else 0)
        self._active[request_id] = _Active(route, request, replies, keys, num_prompt, outputs, most, record)
        self._loop.submit(
            *(
                Request(key, tuple(one.prompt), one.params, one.grammar, request.timeout_s)
                for key, one in zip(keys, admitted, strict=True)
            )
        )

    def _num_bytes(self, prompt: Sequence[int]) -> int:
        """Of a prompt's text."""
        return sum(len(self._tokenizer.token_bytes(token)) for token in prompt)

    def _dispatch(self, event: TokenEvent) -> None:
        request_id, prompt = self._prompt_of.get(event.request_id, ("", 0))
        active = self._active.get(request_id)
        if active is None:
            return  # closed while the engine was ahead of us
        outputs = active.outputs_of(prompt)
        output = outputs[event.index]
        if output.finish_reason is not None:
            return  # ended by a stop string while the engine was ahead of us
        active.num_cached += event.num_cached
        if event.prompt_logprobs is not None:
            active.record.computed()
            for one in outputs:
                one.prompt_logprobs = event.prompt_logprobs
        output.push(event)
        if event.token_id is not None:
            active.record.token()
        if output.finish_reason is not None:
            cancelled = event.finish_reason is FinishReason.CANCELLED
            active.record.output_ended(FinishReason.CANCELLED if cancelled else output.finish_reason)
        if output.finish_reason is not None and event.finish_reason is None:
            self._loop.cancel(event.request_id, event.index)  # the engine knows nothing of stop strings

    def _safely(self, request_id: str, active: _Active) -> Reply:
        """The reply, or, if building it fails, an error for this request alone."""
        try:
            reply = self._reply(request_id, active)
        except ApiError as error:
            return self._failure(request_id, active, error)
        except Exception as error:
            log.error("replying to request %s failed: %s", request_id, type(error).__name__)
            failure = ApiError(500, "internal_error", "the server failed to build the response")
            return self._failure(request_id, active, failure)
        if reply.is_last:
            reasons = {output.finish_reason.value for output in active.outputs if output.finish_reason is not None}
            self._log(request_id, active, reply.status, "+".join(sorted(reasons)))
        return reply

    def _failure(self, request_id: str, active: _Active, error: ApiError) -> Reply:
        self.metrics.failed(error)
        self._log(request_id, active, error.status, error.code)
        self._cancel(request_id)
        return Reply(request_id, active.replies.error(error), status=error.status)

    def _cancel(self, request_id: str) -> None:
        """Forget a request, and stop the engine's work for it."""
        if (active := self._active.pop(request_id, None)) is None:
            return
        for key in active.keys:
            del self._prompt_of[key]
            self._loop.cancel(key)
        for output in active.outputs:
            if output.finish_reason is None:
                active.record.output_ended(FinishReason.CANCELLED)

    def _log(self, request_id: str, active: _Active, status: int, outcome: str) -> None:
        log_ended(request_id, active.route, status, outcome, active.usage, active.record)

    def _reply(self, request_id: str, active: _Active) -> Reply:
        """The client's next reply. Ends the request if it is the last. ApiError if the request failed."""
        if not active.request.stream:
            return self._answer(request_id, active)
        chunk = active.unsent or self._next_chunk(active)
        size = cut_size(chunk)
        active.unsent = chunk[size:]
        is_last = not active.unsent and all(output.is_emitted for output in active.outputs)
        if is_last:
            self._forget(request_id, active)
        return Reply(request_id, chunk[:size], is_last=is_last, content_type=active.replies.chunk_type)

    def _next_chunk(self, active: _Active) -> bytes:
        replies = active.replies
        ready = [output for output in active.outputs if output.has_delta]
        if len(ready) > active.chunk_outputs:
            ready = sorted(ready, key=attrgetter("num_emitted"))[: active.chunk_outputs]
        deltas = [output.next_delta(replies.chunk_tokens) for output in ready]
        if not all(output.is_emitted for output in active.outputs):
            return replies.chunk(deltas, None)
        _raise_if_all_failed(active)
        active.record.answered()
        return replies.chunk(deltas, active.usage)

    def _answer(self, request_id: str, active: _Active) -> Reply:
        """The only reply to a request that does not stream."""
        limit = active.request.sampling.max_new_tokens
        outputs = [output.next_delta(limit) for output in active.outputs]
        self._forget(request_id, active)
        _raise_if_all_failed(active)
        active.record.answered()
        return Reply(request_id, active.replies.answer(outputs, active.usage))

    def _forget(self, request_id: str, active: _Active) -> None:
        del self._active[request_id]
        for key in active.keys:
            del self._prompt_of[key]


def _raise_if_all_failed(active: _Active) -> None:
    errors = [output.error for output in active.outputs if output.error is not None]
    if len(errors) == len(active.outputs):
        raise errors[0]
