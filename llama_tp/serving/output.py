"""Turns one of a request's outputs from tokens into text."""

from __future__ import annotations

from collections.abc import Sequence

from llama_tp.engine.request import FinishReason, Logprobs, TokenEvent
from llama_tp.serving.errors import ApiError
from llama_tp.serving.generation import GenerationRequest, OutputDelta
from llama_tp.text.detokenizer import TextStream
from llama_tp.text.tokenizer import Tokenizer
from llama_tp.text.tools.base import ToolCallParser
from llama_tp.text.tools.calls import ToolCallDelta


class Output:
    """Takes the engine's events and emits deltas. The deltas' texts, joined, are the output's text."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        request: GenerationRequest,
        index: int,
        after: Sequence[int],
        calls: ToolCallParser | None = None,
    ) -> None:
        """`after`: the ids whose text it continues. `calls`: finds tool calls, if it may have any."""
        self.num_tokens = 0
        self.finish_reason: FinishReason | None = None
        self.error: ApiError | None = None
        self.is_emitted = False
        """Whether the last delta has been emitted."""
        self.num_emitted = 0
        """Tokens in its deltas so far."""
        self.prompt_logprobs: Sequence[Logprobs] | None = None
        """For its next delta."""
        self._index = index
        min_tokens = request.sampling.min_new_tokens
        self._keep_stop = request.keep_stop
        self._stream = TextStream(
            tokenizer,
            request.stop,
            min_tokens=min_tokens,
            after=after,
            keep_stop=request.keep_stop,
            specials=request.special_text or (calls is not None and calls.reads_specials),
        )
        self._text: list[str] = []
        self._parser = calls
        self._calls: list[Sequence[ToolCallDelta]] = []
        """As many as texts, if there is a parser."""
        self._ids: list[int] = []
        self._logprobs: list[Logprobs] | None = None if request.sampling.logprobs is None else []

    @property
    def has_delta(self) -> bool:
        return bool(self._ids) or (self.finish_reason is not None and not self.is_emitted)

    def push(self, event: TokenEvent) -> None:
        """Take a step's event for this output, which must not have ended."""
        if event.token_id is not None:
            self.num_tokens += 1
            self._ids.append(event.token_id)
            self._take(self._stream.push(event.token_id))
            if self._logprobs is not None and event.logprobs is not None:
                self._logprobs.append(event.logprobs)
            if self._stream.stopped:
                self._take_rest()
                self.finish_reason = FinishReason.STOP
        if event.stop_id is not None and self._keep_stop:
            self._take(self._stream.push(event.stop_id))
        if event.finish_reason is not None and self.finish_reason is None:
            self._take(self._stream.flush())
            self._take_rest()
            self.error = _error_in(event)
            self.finish_reason = event.finish_reason if self.error is None else FinishReason.ERROR

    def _take(self, text: str) -> None:
        """New text, of which calls may be a part."""
        if self._parser is not None:
            text, calls = self._parser.push(text) if text else ("", ())
            self._calls.append(calls)
        self._text.append(text)

    def _take_rest(self) -> None:
        """What the parser has held back."""
        if self._parser is not None:
            text, calls = self._parser.flush()
            self._calls.append(calls)
            self._text.append(text)

    def next_delta(self, max_tokens: int) -> OutputDelta:
        """The oldest tokens not yet emitted, with their text. It is the last delta if the output has ended and no token
        is left."""
        ids, self._ids = self._ids[:max_tokens], self._ids[max_tokens:]
        self.is_emitted = self.finish_reason is not None and not self._ids
        # There is one text per token, from its push; text of a stop token and from flush belongs to the last delta.
        num_texts = len(self._text) if self.is_emitted else len(ids)
        text, self._text = "".join(self._text[:num_texts]), self._text[num_texts:]
        calls, self._calls = self._calls[:num_texts], self._calls[num_texts:]
        logprobs = self._logprobs
        if logprobs is not None:
            logprobs, self._logprobs = logprobs[:max_tokens], logprobs[max_tokens:]
        self.num_emitted += len(ids)
        prompt_logprobs, self.prompt_logprobs = self.prompt_logprobs, None
        return OutputDelta(
            index=self._index,
            text=text,
            ids=ids,
            logprobs=logprobs,
            finish_reason=self.finish_reason if self.is_emitted else None,
            error=self.error if self.is_emitted else None,
            tool_calls=[call for one in calls for call in one] if calls else (),
            stop_string=self._stream.stop_string if self.is_emitted else None,
            prompt_logprobs=prompt_logprobs,
        )


def _error_in(event: TokenEvent) -> ApiError | None:
    """Why an output failed."""
    if event.finish_reason is FinishReason.CANCELLED:
        return ApiError(503, "cancelled", "the request was cancelled by the server; send it again")
    if event.finish_reason is FinishReason.ERROR:
        code = event.error or "internal_error"
        return ApiError(_STATUS.get(code, 500), code, _MESSAGES.get(code, _MESSAGES["internal_error"]))
    return None


_STATUS = {"queue_full": 429, "grammar_too_complex": 400, "no_token_allowed": 400}
_MESSAGES = {
    "nan_logits": "the model produced non-finite numbers for this request; other requests are not affected",
    "queue_full": "too many requests are already waiting; try again later",
    "no_token_allowed": (
        "the request rules out every token: the form of the answer, allowed_token_ids, bad_words and the minimum of "
        "tokens leave none; relax one of them"
    ),
    "grammar_too_complex": "the grammar became too complex for this answer; simplify it, patterns first of all",
    "internal_error": "the engine could not run this request",
}
