"""Where the API, the text layer and the engine meet: bodies in, replies out. Knows neither HTTP server nor threads.

`open` a request under an id of the caller's, `poll` for replies, `close` it when its client has gone. A request ends
with its last reply. Nothing here raises for what a user sent: that is a reply, too.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from time import monotonic

from llama_tp.engine.loop import EngineLoop
from llama_tp.engine.request import FinishReason, Request, TokenEvent
from llama_tp.serving import native
from llama_tp.serving.native import NativeDefaults, NativeRequest
from llama_tp.serving.schema import ApiError, shown
from llama_tp.text.chat import ChatError, ChatFormat, Message
from llama_tp.text.detokenizer import TextStream
from llama_tp.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

FORM: object = object()
"""Stands for a body that the HTTP server has taken apart as form fields."""
MAX_TOKENS_PER_CHUNK = 64
"""Tokens of one chunk of a stream, so that no chunk reaches native.MAX_CHUNK_BYTES."""


@dataclass(frozen=True, slots=True)
class Reply:
    """Bytes for one client."""

    request_id: str
    body: bytes
    is_first: bool = True
    is_last: bool = True
    status: int = 200
    """Of a request's first reply; later ones cannot change it."""
    content_type: str = "application/json"


@dataclass(slots=True)
class _Active:
    """A request whose last reply has not been made."""

    request: NativeRequest
    key: str
    """Its id in the engine, which is ahead of us: events of an id that was used before must find nobody."""
    num_prompt: int
    stream: TextStream
    num_tokens: int = 0
    has_replied: bool = False
    text: list[str] = field(default_factory=list)
    """Text that no reply holds yet."""
    ids: list[int] = field(default_factory=list)
    """Tokens that no reply holds yet."""
    finish_reason: FinishReason | None = None
    error: ApiError | None = None

    @property
    def has_reply(self) -> bool:
        return self.finish_reason is not None or (self.request.stream and bool(self.ids))


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

    def open(self, request_id: str, body: object, route: str = "") -> None:
        """Take on a request to a route below the model's own. Whatever is wrong with it becomes its only reply."""
        try:
            if route:
                message = f"there is no route {shown(route)}; POST to /predictions/<model> itself"
                raise ApiError(404, "unknown_route", message)
            if body is FORM:
                remedy = "send JSON, such as curl -T FILE, or curl -H 'Content-Type: application/json' -d '{...}'"
                raise ApiError(415, "form_not_supported", f"the body was sent as a form; {remedy}")
            self._start(request_id, body)
        except ApiError as error:
            log.info("request %s refused: %s", request_id, error)
            self._immediate.append(Reply(request_id, error.body(), status=error.status))
        except Exception as error:
            # The type only: the text of an unforeseen error may repeat what the user sent.
            log.error("request %s failed in parsing: %s", request_id, type(error).__name__)
            failure = ApiError(500, "internal_error", "the server failed to read this request")
            self._immediate.append(Reply(request_id, failure.body(), status=500))

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

    def _start(self, request_id: str, body: object) -> None:
        request = native.parse_native(body, self._defaults)
        prompt, stop_ids = self._encode(request)
        max_new_tokens = native.check_context(
            len(prompt),
            request.max_new_tokens,
            self._max_seq_len,
            request.max_new_tokens_explicit,
            param="prompt" if request.dialog is None else "dialog",
        )
        params = request.sampling_params(stop_ids=stop_ids, max_new_tokens=max_new_tokens)
        self._num_started += 1
        key = f"{request_id}#{self._num_started}"
        self._id_of[key] = request_id
        self._active[request_id] = _Active(request, key, len(prompt), TextStream(self._tokenizer, request.stop))
        self._loop.submit(Request(key, tuple(prompt), params))

    def _encode(self, request: NativeRequest) -> tuple[list[int], frozenset[int]]:
        """Prompt ids, and the ids that end the answer."""
        if isinstance(request.prompt, tuple):
            native.check_token_ids(request.prompt, self._vocab_size)
            return list(request.prompt), self._tokenizer.stop_ids
        texts = [request.prompt] if request.prompt is not None else [content for _, content in request.dialog or ()]
        self._refuse_hopeless(texts, "prompt" if request.dialog is None else "dialog")
        if request.prompt is not None:
            return self._tokenizer.encode(request.prompt, bos=self._tokenizer.adds_bos), self._tokenizer.stop_ids
        if isinstance(self._chat, str):
            raise ApiError(400, "chat_not_supported", f"this model cannot chat: {self._chat}", "dialog")
        try:
            dialog = [Message(role, content) for role, content in request.dialog or ()]
            return self._chat.encode(dialog), self._chat.stop_ids
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
        if active is None or active.finish_reason is not None:
            return  # closed, or ended by a stop string, while the engine was ahead of us
        if event.token_id is not None:
            active.num_tokens += 1
            active.ids.append(event.token_id)
            active.text.append(active.stream.push(event.token_id))
            if active.stream.stopped:
                self._loop.cancel(event.request_id)
                active.finish_reason = FinishReason.STOP
        if event.finish_reason is not None and active.finish_reason is None:
            active.text.append(active.stream.flush())
            active.finish_reason = event.finish_reason
        if event.finish_reason is FinishReason.CANCELLED:
            active.error = ApiError(503, "cancelled", "the request was cancelled by the server; send it again")
        elif event.finish_reason is FinishReason.ERROR:
            active.error = ApiError(500, event.error or "internal_error", _WHY.get(event.error or "", _WHY[""]))

    def _safely(self, request_id: str, active: _Active) -> Reply:
        """The reply; should making it fail, an error for this request alone."""
        is_first = not active.has_replied
        try:
            return self._reply(request_id, active)
        except Exception as error:
            log.error("request %s failed in replying: %s", request_id, type(error).__name__)
            self.close(request_id)
            failure = ApiError(500, "internal_error", "the server failed to put the answer into words")
            return Reply(request_id, native.stream_error(failure), is_first, status=500)

    def _reply(self, request_id: str, active: _Active) -> Reply:
        """What the client gets now. The request is over if that is all."""
        backlog = active.request.stream and len(active.ids) > MAX_TOKENS_PER_CHUNK
        is_first, active.has_replied = not active.has_replied, True
        if active.finish_reason is None or backlog:
            # A token's text is where its push put it; what flush added belongs to the last chunk.
            ids, active.ids = active.ids[:MAX_TOKENS_PER_CHUNK], active.ids[MAX_TOKENS_PER_CHUNK:]
            text, active.text = "".join(active.text[: len(ids)]), active.text[len(ids) :]
            return Reply(request_id, native.chunk(text, ids), is_first, is_last=False, content_type=_LINES)
        del self._active[request_id]
        del self._id_of[active.key]
        if active.error is not None:
            return Reply(request_id, native.stream_error(active.error), is_first, status=active.error.status)
        text = "".join(active.text)
        usage = (active.finish_reason, active.num_prompt, active.num_tokens)
        if active.request.stream:
            return Reply(request_id, native.last_chunk(text, active.ids, *usage), is_first, content_type=_LINES)
        return Reply(request_id, native.answer(text, *usage))


_LINES = "application/jsonl"

_WHY = {
    "nan_logits": "the model produced numbers that are not finite for this request; other requests are not affected",
    "": "the engine could not run this request",
}
