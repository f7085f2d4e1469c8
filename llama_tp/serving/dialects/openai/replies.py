"""Formats the replies of OpenAI's completion routes: one JSON object, or a stream of server-sent events.

An event is `data: {...}` and an empty line; the last one is `data: [DONE]`.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from llama_tp.engine.request import FinishReason
from llama_tp.serving.dialects.base import Accepted
from llama_tp.serving.dialects.openai.logprobs import CompletionLogprobs, TokenNames, chat_logprobs, prompt_logprobs
from llama_tp.serving.dialects.tools import call_id
from llama_tp.serving.encoding import to_json
from llama_tp.serving.errors import ApiError
from llama_tp.serving.generation import OutputDelta, Usage
from llama_tp.serving.reply_size import MAX_CHUNK_BYTES, check_answer, chunk_tokens
from llama_tp.text.detokenizer import Detokenizer
from llama_tp.text.tokenizer import Tokenizer
from llama_tp.text.tools.calls import ToolCallDelta, whole_calls

_DONE = b"data: [DONE]\n\n"
_ECHO_CHARACTERS = 8192
"""Characters of the prompt per event: at worst, each is an escape of six bytes."""
_MAX_STREAMED_PROMPT_IDS = 5800
"""Ids of a prompt in one event. With up to ten digits each, they take less than MAX_CHUNK_BYTES."""


class _Replies(ABC):
    """What the Replies of both routes have in common."""

    chunk_type = "text/event-stream"
    prefix: ClassVar[str]
    """Of ids."""
    object_name: ClassVar[str]
    """Of a whole answer."""
    chunk_name: ClassVar[str]
    """Of a part of a stream."""

    def __init__(self, accepted: Accepted, model_name: str, tokenizer: Tokenizer, longest_token: int) -> None:
        request = accepted.request
        self.chunk_tokens = chunk_tokens(request, longest_token)
        self._tokenizer = tokenizer
        self._request = request
        self._prompts = accepted.prompts
        self._names = TokenNames(tokenizer, as_ids=request.reply.tokens_as_ids)
        self._has_ids = request.reply.token_ids
        self._has_specials = request.special_text
        longest = max(map(len, accepted.prompts))
        if self._has_ids and request.stream and longest > _MAX_STREAMED_PROMPT_IDS:
            message = (
                f"return_token_ids=true sends the prompt's {longest} ids in one event, which holds "
                f"{_MAX_STREAMED_PROMPT_IDS}; leave out one of return_token_ids and stream"
            )
            raise ApiError(400, "answer_too_large", message, "return_token_ids")
        self._fields = {
            "id": f"{self.prefix}-{accepted.id}",
            "object": self.chunk_name if request.stream else self.object_name,
            "created": int(time.time()),
            "model": model_name,
        }
        # An event is the same for every token but for its choice.
        self._before = b"data: " + to_json(self._fields)[:-1] + b',"choices":['
        self._after = b'],"usage":null}\n\n' if request.reply.usage_in_stream else b"]}\n\n"
        self._begun: set[int] = set()  # outputs
        self._has_begun = False
        self._num_tokens = 0

    def chunk(self, deltas: Sequence[OutputDelta], usage: Usage | None) -> bytes:
        """An event for each delta. The outputs of a prompt begin with their `_opening` when the first of them does; the
        stream ends with the usage, if requested."""
        _raise_first_error(deltas)
        events = []
        for delta in deltas:
            for one in self._beginning(delta):
                events += [self._event(choice, **fields) for choice, fields in self._opening(one)]
        for delta in deltas:
            self._num_tokens += len(delta.ids)
            events.append(self._event(self._delta(delta)))
        if usage is not None:
            if self._request.reply.usage_in_stream:
                last = to_json({**self._fields, "choices": [], "usage": _usage(usage)})
                events.append(b"data: " + last + b"\n\n")
            events.append(_DONE)
        body = b"".join(events)
        check_answer(body, remedy="leave out echo, or send a shorter prompt")
        self._has_begun = True
        return body

    def _beginning(self, delta: OutputDelta) -> list[OutputDelta]:
        """The delta as the first of each output that begins with it."""
        if delta.index in self._begun:
            return []
        n = self._request.sampling.n
        siblings = range(delta.index // n * n, (delta.index // n + 1) * n)
        self._begun.update(siblings)
        return [replace(delta, index=index) for index in siblings]

    def answer(self, outputs: Sequence[OutputDelta], usage: Usage) -> bytes:
        _raise_first_error(outputs)
        choices = [self._choice(output) for output in outputs]
        body = to_json({**self._fields, "choices": choices, "usage": _usage(usage), **self._also(outputs)}) + b"\n"
        check_answer(body)
        return body

    def error(self, error: ApiError) -> bytes:
        """An object, or an event at the end of a stream that fails after its status was sent."""
        body = error.body()
        return b"data: " + body + b"\n\n" + _DONE if self._has_begun else body + b"\n"

    def _event(self, choice: dict[str, Any], **fields: Any) -> bytes:
        if self._request.reply.continuous_usage:
            fields["usage"] = Usage(sum(map(len, self._prompts)), self._num_tokens).fields()
        after = self._after
        if fields:
            after = b"]," + to_json(fields)[1:-1] + (b"}\n\n" if "usage" in fields else self._after[1:])
        event = self._before + to_json(choice) + after
        assert len(event) <= MAX_CHUNK_BYTES, f"an event of {len(event)} bytes: the text layer must emit sooner"
        return event

    @abstractmethod
    def _opening(self, delta: OutputDelta) -> Iterator[tuple[dict[str, Any], Mapping[str, Any]]]:
        """The choices of an output's first events, before its first delta, and further fields of each event."""

    @abstractmethod
    def _delta(self, delta: OutputDelta) -> dict[str, Any]:
        """A part of an output, in a stream."""

    @abstractmethod
    def _choice(self, output: OutputDelta) -> dict[str, Any]:
        """A whole output."""

    def _also(self, outputs: Sequence[OutputDelta]) -> dict[str, Any]:
        """Further fields of an answer."""
        return {}

    def _prompt_logprobs(self, output: OutputDelta, prompt: Sequence[int]) -> dict[str, Any]:
        """The field for them, if requested."""
        num_top = self._request.reply.prompt_logprobs
        if num_top is None or output.prompt_logprobs is None:
            return {}
        return {"prompt_logprobs": prompt_logprobs(prompt, output.prompt_logprobs, num_top, self._names)}


class ChatReplies(_Replies):
    """The Replies to a request to v1/chat/completions."""

    prefix = "chatcmpl"
    object_name = "chat.completion"
    chunk_name = "chat.completion.chunk"

    def __init__(self, accepted: Accepted, model_name: str, tokenizer: Tokenizer, longest_token: int) -> None:
        super().__init__(accepted, model_name, tokenizer, longest_token)
        self._id = accepted.id
        self._calling: set[int] = set()  # outputs with a tool call

    def _opening(self, delta: OutputDelta) -> Iterator[tuple[dict[str, Any], Mapping[str, Any]]]:
        first = {"role": "assistant", "content": ""}
        yield {"index": delta.index, "delta": first, "logprobs": None, "finish_reason": None}, self._also([delta])

    def _delta(self, delta: OutputDelta) -> dict[str, Any]:
        content: dict[str, Any] = {"content": delta.text}
        if delta.tool_calls:
            self._calling.add(delta.index)
            content["tool_calls"] = [self._call_delta(delta.index, call) for call in delta.tool_calls]
        return self._with_details(delta, {"index": delta.index, "delta": content})

    def _call_delta(self, output: int, call: ToolCallDelta) -> dict[str, Any]:
        if call.name is None:
            return {"index": call.index, "function": {"arguments": call.arguments}}
        return {"index": call.index, **self._call(output, call.index, call.name, call.arguments)}

    def _call(self, output: int, index: int, name: str, arguments: str) -> dict[str, Any]:
        call_id_ = call_id("call_", self._id, output=output, call=index)
        return {"id": call_id_, "type": "function", "function": {"name": name, "arguments": arguments}}

    def _choice(self, output: OutputDelta) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": output.text, "refusal": None}
        if calls := whole_calls(output.tool_calls):
            self._calling.add(output.index)
            message["content"] = output.text or None
            message["tool_calls"] = [
                self._call(output.index, index, call.name, call.arguments) for index, call in enumerate(calls)
            ]
        return self._with_details(output, {"index": output.index, "message": message})

    def _with_details(self, delta: OutputDelta, choice: dict[str, Any]) -> dict[str, Any]:
        logprobs = delta.logprobs
        choice["logprobs"] = None if logprobs is None else chat_logprobs(delta.ids, logprobs, self._names)
        is_call = delta.finish_reason is FinishReason.STOP and delta.index in self._calling
        choice["finish_reason"] = "tool_calls" if is_call else delta.finish_reason
        if self._has_ids:
            choice["token_ids"] = delta.ids
        return choice

    def _also(self, outputs: Sequence[OutputDelta]) -> dict[str, Any]:
        (prompt,) = self._prompts
        return {
            **({"prompt_token_ids": prompt} if self._has_ids else {}),
            **self._prompt_logprobs(outputs[0], prompt),
        }


class CompletionReplies(_Replies):
    """The Replies to a request to v1/completions."""

    prefix = "cmpl"
    object_name = chunk_name = "text_completion"

    def __init__(self, accepted: Accepted, model_name: str, tokenizer: Tokenizer, longest_token: int) -> None:
        super().__init__(accepted, model_name, tokenizer, longest_token)
        # Beside its place in each list, a token is always among the most probable ones.
        self.chunk_tokens = chunk_tokens(accepted.request, longest_token, more_records=1)
        self._echoes = accepted.request.reply.echo
        self._logprobs: list[CompletionLogprobs] = []
        if (num_top := accepted.request.sampling.logprobs) is not None:
            after = [() if self._echoes else prompt for prompt in accepted.prompts]
            self._logprobs = [
                CompletionLogprobs(self._names, Detokenizer(tokenizer, ids, specials=self._has_specials), num_top)
                for ids in after
                for _ in range(accepted.request.sampling.n)
            ]

    def _opening(self, delta: OutputDelta) -> Iterator[tuple[dict[str, Any], Mapping[str, Any]]]:
        if self._has_ids:
            yield _completion(delta.index, "", None, None) | {"prompt_token_ids": self._prompt_of(delta.index)}, {}
        if not self._echoes:
            return
        if self._logprobs:
            for text, logprobs in self._scored_echo(delta, self.chunk_tokens):
                yield _completion(delta.index, text, logprobs, None), {}
            return
        text = self._echo(delta.index)
        for at in range(0, len(text), _ECHO_CHARACTERS):
            yield _completion(delta.index, text[at : at + _ECHO_CHARACTERS], None, None), {}

    def _delta(self, delta: OutputDelta) -> dict[str, Any]:
        logprobs = None
        if self._logprobs and delta.logprobs is not None:
            _, logprobs = self._logprobs[delta.index].next(delta.ids, delta.logprobs)
        choice = _completion(delta.index, delta.text, logprobs, delta.finish_reason)
        if self._has_ids:
            choice["token_ids"] = delta.ids
        return choice

    def _choice(self, output: OutputDelta) -> dict[str, Any]:
        prompt = self._prompt_of(output.index)
        echo: tuple[str, dict[str, Any]] = ("", {})
        if self._echoes and self._logprobs:
            (echo,) = self._scored_echo(output, len(prompt))
        elif self._echoes:
            echo = (self._echo(output.index), {})
        choice = self._delta(output)
        choice["text"] = echo[0] + output.text
        for name, values in echo[1].items():
            choice["logprobs"][name] = values + choice["logprobs"][name]
        if self._has_ids:
            choice["prompt_token_ids"] = prompt
        return choice | self._prompt_logprobs(output, prompt)

    def _prompt_of(self, index: int) -> Sequence[int]:
        """The ids of an output's prompt."""
        return self._prompts[index // self._request.sampling.n]

    def _echo(self, index: int) -> str:
        """The text of an output's prompt: as it was sent, if that is what the model reads."""
        prompt = self._request.prompts[index // self._request.sampling.n]
        if isinstance(prompt, str) and self._request.truncate_prompt_tokens is None:
            return prompt
        text = Detokenizer(self._tokenizer, specials=self._has_specials)
        return "".join(map(text.push, self._prompt_of(index))) + text.flush()

    def _scored_echo(self, delta: OutputDelta, size: int) -> Iterator[tuple[str, dict[str, Any]]]:
        """The text of an output's prompt with its log probabilities, `size` tokens at a time."""
        prompt, scores = self._prompt_of(delta.index), [None, *(delta.prompt_logprobs or ())]
        for at in range(0, len(prompt), size):
            yield self._logprobs[delta.index].next(prompt[at : at + size], scores[at : at + size])


def _completion(index: int, text: str, logprobs: dict[str, Any] | None, finish_reason: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}


def _raise_first_error(deltas: Sequence[OutputDelta]) -> None:
    """One failed output fails the request: these APIs have no finish_reason for it."""
    for delta in deltas:
        if delta.error is not None:
            raise delta.error


def _usage(usage: Usage) -> dict[str, Any]:
    return {**usage.fields(), "prompt_tokens_details": {"cached_tokens": usage.cached_tokens}}
