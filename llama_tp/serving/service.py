"""Where the API, the text layer and the engine meet: bodies in, replies out. Knows neither HTTP server nor threads.

`open` a request under an id of the caller's, `poll` for replies, `close` it when its client has gone. A request ends
with its last reply. Nothing here raises for what a user sent: that is a reply, too.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Any

from llama_tp.engine.loop import EngineLoop
from llama_tp.engine.request import FinishReason, Request, TokenEvent
from llama_tp.serving import native
from llama_tp.serving.native import NativeDefaults, NativeRequest, Part
from llama_tp.serving.reply import Reply
from llama_tp.serving.schema import ApiError, shown
from llama_tp.text.chat import ChatFormat
from llama_tp.text.detokenizer import TextStream
from llama_tp.text.dialog import ChatError, Message
from llama_tp.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)


class _Output:
    """One of a request's outputs: how far it is, and what of it no reply holds yet."""

    def __init__(self, tokenizer: Tokenizer, request: NativeRequest, index: int, after: Sequence[int]) -> None:
        """`after`: the ids whose text it continues."""
        self.num_tokens = 0
        self.finish_reason: FinishReason | None = None
        self.error: ApiError | None = None
        self.is_told = False
        """Whether a reply holds its end."""
        self._index = None if request.n == 1 else index
        self._token_bytes = tokenizer.token_bytes
        self._stream = TextStream(tokenizer, request.stop, min_tokens=request.min_new_tokens, after=after)
        self._text: list[str] = []
        self._ids: list[int] = []
        self._logprobs: list[dict[str, Any]] | None = None if request.logprobs is None else []

    @property
    def has_news(self) -> bool:
        return bool(self._ids) or (self.finish_reason is not None and not self.is_told)

    def take(self, event: TokenEvent) -> None:
        """What a step meant for it. It must not have ended."""
        if event.token_id is not None:
            self.num_tokens += 1
            self._ids.append(event.token_id)
            self._text.append(self._stream.push(event.token_id))
            if self._logprobs is not None and event.logprobs is not None:
                self._logprobs.append(native.token_logprobs(event.token_id, event.logprobs, self._token_bytes))
            if self._stream.stopped:
                self.finish_reason = FinishReason.STOP
        if event.finish_reason is not None and self.finish_reason is None:
            self._text.append(self._stream.flush())
            self.error = _error_in(event)
            self.finish_reason = event.finish_reason if self.error is None else FinishReason.ERROR

    def tell(self, limit: int) -> Part:
        """What no reply holds yet, of at most `limit` tokens; the end, too, where no token is left then."""
        ids, self._ids = self._ids[:limit], self._ids[limit:]
        self.is_told = self.finish_reason is not None and not self._ids
        # A token's text is where its push put it; what flush added belongs to the last part.
        num_texts = len(self._text) if self.is_told else len(ids)
        text, self._text = "".join(self._text[:num_texts]), self._text[num_texts:]
        logprobs = self._logprobs
        if logprobs is not None:
            logprobs, self._logprobs = logprobs[:limit], logprobs[limit:]
        return Part(
            index=self._index,
            text=text,
            ids=ids,
            logprobs=logprobs,
            finish_reason=self.finish_reason if self.is_told else None,
            error=self.error if self.is_told else None,
        )


@dataclass(slots=True)
class _Active:
    """A request whose last reply has not been made."""

    request: NativeRequest
    key: str
    """Its id in the engine, which is ahead of us: events of an id that was used before must find nobody."""
    num_prompt: int
    outputs: list[_Output]
    chunk_tokens: int
    """Tokens of one output that a reply may hold."""

    @property
    def has_ended(self) -> bool:
        return all(output.finish_reason is not None for output in self.outputs)

    @property
    def has_reply(self) -> bool:
        return self.has_ended or (self.request.stream and any(output.has_news for output in self.outputs))


class LlamaService:
    """Serves the native dialect from one engine loop. Not thread-safe: one thread opens, polls and closes.

    `chat` is the model's chat format, or the reason why it has none.
    """

    def __init__(
        self,
        loop: EngineLoop,
        tokenizer: Tokenizer,
        chat: ChatFormat | str,
        defaults: NativeDefaults,
    ) -> None:
        self._loop = loop
        self._tokenizer = tokenizer
        self._chat = chat
        self._defaults = defaults
        self._max_seq_len = loop.engine.config.max_seq_len
        self._max_waiting = loop.engine.config.max_waiting
        self._vocab_size = loop.engine.runner.model.args.vocab_size
        self._longest_token = max(len(tokenizer.token_bytes(token)) for token in range(tokenizer.vocab_size))
        self._active: dict[str, _Active] = {}
        self._id_of: dict[str, str] = {}
        self._num_started = 0
        self._immediate: list[Reply] = []

    @property
    def open_ids(self) -> set[str]:
        """Requests that have been opened and have neither had their last reply nor been closed."""
        return self._active.keys() | {reply.request_id for reply in self._immediate}

    def is_generating(self, request_id: str) -> bool:
        """Whether a request has tokens, but not its last reply."""
        active = self._active.get(request_id)
        return active is not None and any(output.num_tokens for output in active.outputs)

    def open(self, request_id: str, body: object, route: str = "", *, can_stream: bool = True) -> None:
        """Take on a request to a route below the model's own. Whatever is wrong with it becomes its only reply."""
        try:
            if route:
                message = f"there is no route {shown(route)}; POST to /predictions/<model> itself"
                raise ApiError(404, "unknown_route", message)
            self._start(request_id, body, can_stream)
        except ApiError as error:
            self.refuse(request_id, error)
        except Exception as error:
            # The type only: the text of an unforeseen error may repeat what the user sent.
            log.error("request %s failed in parsing: %s", request_id, type(error).__name__)
            self.refuse(request_id, ApiError(500, "internal_error", "the server failed to read this request"))

    def refuse(self, request_id: str, error: ApiError) -> None:
        """Answer a request with an error."""
        log.info("request %s refused: %s", request_id, error)
        self._immediate.append(Reply(request_id, error.body(), status=error.status))

    def close(self, request_id: str) -> None:
        """The client has gone: stop generating."""
        self._immediate = [reply for reply in self._immediate if reply.request_id != request_id]
        if (active := self._active.pop(request_id, None)) is not None:
            del self._id_of[active.key]
            self._loop.cancel(active.key)

    def poll(self, timeout_s: float) -> list[Reply]:
        """All replies there are, waiting up to timeout_s for the first; at most one for each request."""
        deadline = monotonic() + timeout_s
        remaining = 0.0  # refusals do not wait, but what the engine has done is heard every time
        while True:
            if self._active:
                for event in self._loop.poll(remaining):
                    self._take(event)
            replies, self._immediate = self._immediate, []
            replies += [self._safely(key, active) for key, active in list(self._active.items()) if active.has_reply]
            remaining = deadline - monotonic()
            if replies or remaining <= 0 or not self._active:
                return replies

    def _start(self, request_id: str, body: object, can_stream: bool) -> None:
        request = native.parse_native(body, self._defaults)
        if request.stream and not can_stream:
            message = "stream=true is possible over HTTP only; leave it out, or POST to /predictions/<model>"
            raise ApiError(400, "stream_not_supported", message, "stream")
        native.check_vocabulary(request, self._vocab_size)
        native.check_outputs(request.n, self._max_waiting)
        prompt, stop_ids = self._encode(request)
        max_new_tokens = native.check_context(
            len(prompt),
            request.max_new_tokens,
            self._max_seq_len,
            request.max_new_tokens_explicit,
            param="prompt" if request.dialog is None else "dialog",
            min_new_tokens=request.min_new_tokens,
        )
        native.check_answer_size(request, max_new_tokens)
        params = request.sampling_params(stop_ids=stop_ids, max_new_tokens=max_new_tokens)
        self._num_started += 1
        key = f"{request_id}#{self._num_started}"
        self._id_of[key] = request_id
        continued = prompt if request.continues_text else []
        outputs = [_Output(self._tokenizer, request, index, continued) for index in range(request.n)]
        chunk_tokens = native.chunk_tokens(request, self._longest_token) if request.stream else max_new_tokens
        self._active[request_id] = _Active(request, key, len(prompt), outputs, chunk_tokens)
        self._loop.submit(Request(key, tuple(prompt), params, request.timeout_s))

    def _encode(self, request: NativeRequest) -> tuple[list[int], frozenset[int]]:
        """Prompt ids, and the ids that end the answer."""
        if isinstance(request.prompt, tuple):
            return list(request.prompt), self._tokenizer.stop_ids
        texts = [request.prompt] if request.prompt is not None else [content for _, content in request.dialog or ()]
        self._refuse_hopeless(texts, "prompt" if request.dialog is None else "dialog")
        if request.prompt is not None:
            return self._tokenizer.encode(request.prompt, bos=self._tokenizer.adds_bos), self._tokenizer.stop_ids
        if isinstance(self._chat, str):
            raise ApiError(400, "chat_not_supported", f"this model cannot chat: {self._chat}", "dialog")
        try:
            dialog = [Message(role, content) for role, content in request.dialog or ()]
            ids = self._chat.encode(dialog, continue_final_message=request.continue_final_message)
            return ids, self._chat.stop_ids
        except ChatError as error:
            raise ApiError(400, error.code, str(error), error.param("dialog")) from None

    def _refuse_hopeless(self, texts: list[str], param: str) -> None:
        """Texts that cannot fit, however they are tokenized, are not tokenized: that would take seconds."""
        fewest = sum(map(len, texts)) // self._longest_token
        if fewest >= self._max_seq_len:
            raise ApiError(
                400,
                "context_length_exceeded",
                f"{param} has at least {fewest} tokens, but the context holds {self._max_seq_len} tokens, "
                "prompt and answer together",
                param,
            )

    def _take(self, event: TokenEvent) -> None:
        active = self._active.get(self._id_of.get(event.request_id, ""))
        if active is None:
            return  # closed while the engine was ahead of us
        output = active.outputs[event.index]
        if output.finish_reason is not None:
            return  # ended by a stop string while the engine was ahead of us
        output.take(event)
        if output.finish_reason is not None and event.finish_reason is None:
            self._loop.cancel(active.key, event.index)  # the engine knows nothing of stop strings

    def _safely(self, request_id: str, active: _Active) -> Reply:
        """The reply; should making it fail, an error for this request alone."""
        try:
            return self._reply(request_id, active)
        except ApiError as error:
            return Reply(request_id, native.stream_error(error), status=error.status)
        except Exception as error:
            log.error("request %s failed in replying: %s", request_id, type(error).__name__)
            self.close(request_id)
            failure = ApiError(500, "internal_error", "the server failed to build the response")
            return Reply(request_id, native.stream_error(failure), status=500)

    def _reply(self, request_id: str, active: _Active) -> Reply:
        """What the client gets now. The request is over if that is all. ApiError if it failed."""
        parts = [output.tell(active.chunk_tokens) for output in active.outputs if output.has_news]
        if not all(output.is_told for output in active.outputs):
            return Reply(request_id, native.lines(parts), is_last=False, content_type=_LINES)
        del self._active[request_id]
        del self._id_of[active.key]
        errors = [output.error for output in active.outputs if output.error is not None]
        if len(errors) == len(active.outputs):
            raise errors[0]
        usage = native.usage(active.num_prompt, sum(output.num_tokens for output in active.outputs))
        if active.request.stream:
            return Reply(request_id, native.lines(parts, usage), content_type=_LINES)
        return Reply(request_id, native.answer(parts, usage))


def _error_in(event: TokenEvent) -> ApiError | None:
    """Why an output failed."""
    if event.finish_reason is FinishReason.CANCELLED:
        return ApiError(503, "cancelled", "the request was cancelled by the server; send it again")
    if event.finish_reason is FinishReason.ERROR:
        code = event.error or "internal_error"
        return ApiError(429 if code == "queue_full" else 500, code, _WHY.get(code, _WHY["internal_error"]))
    return None


_LINES = "application/jsonl"

_WHY = {
    "nan_logits": "the model produced numbers that are not finite for this request; other requests are not affected",
    "queue_full": "too many requests are waiting already; try again later",
    "internal_error": "the engine could not run this request",
}
