"""The dialect of /predictions/llama: one JSON object in, one JSON object or one JSON line per chunk out.

    {"prompt": "The capital of France is", "max_new_tokens": 50}
    {"dialog": [{"role": "user", "content": "Hi"}], "max_new_tokens": 50, "mode": "chat"}

What can be judged without a tokenizer and without the model's limits is judged by `parse_native`; the rest by
`check_context`, `check_token_ids` and the chat format. The prompt may be text or
token ids. null is a wrong type like any other, except for `seed`, where it means: not reproducible.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, FailFast
from pydantic_core import PydanticCustomError

from llama_tp.engine.request import FinishReason, SamplingParams
from llama_tp.serving.schema import (
    ABSENT,
    ApiError,
    MaxNewTokens,
    MinP,
    Seed,
    StopStrings,
    StrictModel,
    Temperature,
    TopK,
    TopP,
    must_be_text,
    parse_json,
    to_json,
    validate,
)

MAX_CHUNK_BYTES = 64 * 1024

Mode = Literal["text_completion", "chat"]


@dataclass(frozen=True, slots=True)
class NativeDefaults:
    """What the handler's configuration says for requests that leave it open."""

    mode: Mode
    """Only names the field to send when a request has neither a prompt nor a dialog."""
    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class NativeRequest:
    """A request with every default filled in. Exactly one of prompt and dialog is set, as the mode says."""

    mode: Mode
    prompt: str | tuple[int, ...] | None
    """Text, or token ids of which only the upper bound is still unchecked."""
    dialog: tuple[tuple[str, str], ...] | None
    """(role, content) of each message; roles and their order are the chat format's to judge."""
    max_new_tokens: int
    max_new_tokens_explicit: bool
    """The request itself asked for max_new_tokens: then it is a promise to keep or refuse, and not clipped."""
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int | None
    stop: tuple[str, ...]
    """Stop strings; the text layer looks for them."""
    stream: bool
    """One JSON line per chunk instead of one answer."""

    def sampling_params(self, *, stop_ids: frozenset[int], max_new_tokens: int) -> SamplingParams:
        """How to sample it, with the max_new_tokens that `check_context` found to fit."""
        return SamplingParams(
            max_new_tokens=max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            seed=self.seed,
            stop_ids=stop_ids,
        )


def _text_or_ids(prompt: object) -> str | tuple[int, ...]:
    # Not a union of pydantic types: that makes an error of each of a hundred thousand wrong ids.
    if not isinstance(prompt, (str, list)):
        raise PydanticCustomError("invalid_type", "must be a string or a list of token ids")
    if not prompt:
        raise PydanticCustomError("empty_prompt", "must not be empty")
    if isinstance(prompt, str):
        return prompt
    for at, token in enumerate(prompt):
        if type(token) is not int:  # a bool is an int, too
            raise PydanticCustomError("invalid_type", "must be an integer", {"at": at})
        if token < 0:
            raise PydanticCustomError("token_out_of_range", "is negative, which no token id is", {"at": at})
    return tuple(prompt)


class _Message(StrictModel):
    role: str
    content: str


def _some_messages(messages: list[_Message]) -> tuple[tuple[str, str], ...]:
    if not messages:
        raise PydanticCustomError("empty_messages", "must hold at least one message")
    return tuple((message.role, message.content) for message in messages)


class _Body(StrictModel):
    prompt: Annotated[Any, AfterValidator(_text_or_ids)] = ABSENT
    dialog: Annotated[list[_Message], FailFast(), AfterValidator(_some_messages)] = ABSENT
    mode: Annotated[Mode, BeforeValidator(must_be_text)] = ABSENT
    max_new_tokens: MaxNewTokens = ABSENT
    temperature: Temperature = ABSENT
    top_p: TopP = ABSENT
    top_k: TopK = ABSENT
    min_p: MinP = ABSENT
    seed: Seed | None = None
    stop: StopStrings = ABSENT
    stream: bool = False


def parse_native(body: object, defaults: NativeDefaults) -> NativeRequest:
    """The request in a body (bytes, text, or already parsed JSON). ApiError with status 400 if it is none.

    A prompt is text_completion and a dialog is chat; `mode` may say so too, but may not say otherwise.
    """
    fields = validate(_Body, parse_json(body))
    given: dict[str, Any] = {name: getattr(fields, name) for name in fields.model_fields_set}
    return NativeRequest(
        mode=_mode(given, defaults),
        prompt=given.get("prompt"),
        dialog=given.get("dialog"),
        max_new_tokens=given.get("max_new_tokens", defaults.max_new_tokens),
        max_new_tokens_explicit="max_new_tokens" in given,
        temperature=given.get("temperature", defaults.temperature),
        top_p=given.get("top_p", defaults.top_p),
        top_k=given.get("top_k", defaults.top_k),
        min_p=given.get("min_p", defaults.min_p),
        seed=given.get("seed", defaults.seed),
        stop=tuple(given.get("stop", ())),
        stream=fields.stream,
    )


def _mode(given: dict[str, Any], defaults: NativeDefaults) -> Mode:
    """The mode that the fields of a request agree on."""
    if "prompt" in given and "dialog" in given:
        raise ApiError(400, "conflicting_fields", "prompt and dialog are both given; send one of them", "dialog")
    if "prompt" not in given and "dialog" not in given:
        needed = "dialog" if given.get("mode", defaults.mode) == "chat" else "prompt"
        raise ApiError(400, "missing_field", f"{needed} is missing; send a prompt, or a dialog to chat", needed)
    present = "dialog" if "dialog" in given else "prompt"
    mode: Mode = "chat" if present == "dialog" else "text_completion"
    if given.get("mode", mode) != mode:
        message = f"mode={given['mode']!r} contradicts {present}, which is for {mode!r}; leave mode out"
        raise ApiError(400, "conflicting_fields", message, "mode")
    return mode


def check_context(
    num_prompt_tokens: int,
    max_new_tokens: int,
    max_seq_len: int,
    explicit: bool,
    param: str = "prompt",
    limit_param: str = "max_new_tokens",
) -> int:
    """The max_new_tokens to use. ApiError if prompt and generated tokens do not fit; a default is clipped instead.

    param and limit_param are what the dialect calls the prompt and max_new_tokens.
    """
    room = max_seq_len - num_prompt_tokens
    if room < 1:
        message = (
            f"{param} has {num_prompt_tokens} tokens, but the context of {max_seq_len} tokens must hold at least one "
            f"generated token as well; send at most {max_seq_len - 1}"
        )
        raise ApiError(400, "context_length_exceeded", message, param)
    if explicit and max_new_tokens > room:
        message = (
            f"{limit_param}={max_new_tokens} does not fit after {param} of {num_prompt_tokens} tokens into the "
            f"context of {max_seq_len} tokens; ask for at most {room}"
        )
        raise ApiError(400, "context_length_exceeded", message, limit_param)
    return min(max_new_tokens, room)


def check_token_ids(ids: Sequence[int], vocab_size: int, param: str = "prompt") -> None:
    """ApiError for the first id that is not in the vocabulary."""
    if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
        at = next(index for index, token in enumerate(ids) if not 0 <= token < vocab_size)
        message = f"{param}[{at}]={ids[at]} is not a token id; the vocabulary is 0 to {vocab_size - 1}"
        raise ApiError(400, "token_out_of_range", message, f"{param}[{at}]")


def answer(text: str, finish_reason: FinishReason, prompt_tokens: int, completion_tokens: int) -> bytes:
    """The whole reply to a request that does not stream."""
    return to_json({"text": text, **_ending(finish_reason, prompt_tokens, completion_tokens)}) + b"\n"


def chunk(text: str, ids: Sequence[int]) -> bytes:
    """One line of a stream: new text and the ids of the new tokens; either may be empty."""
    return _line({"text": text, "ids": ids})


def last_chunk(
    text: str, ids: Sequence[int], finish_reason: FinishReason, prompt_tokens: int, completion_tokens: int
) -> bytes:
    """The line that ends a stream, with what `answer` says besides the text."""
    return _line({"text": text, "ids": ids, **_ending(finish_reason, prompt_tokens, completion_tokens)})


def stream_error(error: ApiError) -> bytes:
    """The line that ends a stream that has failed after its status was sent."""
    return error.body() + b"\n"


def _ending(finish_reason: FinishReason, prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
    usage = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
    return {"finish_reason": finish_reason.value, "usage": usage}


def _line(record: dict[str, Any]) -> bytes:
    line = to_json(record) + b"\n"
    assert len(line) <= MAX_CHUNK_BYTES, f"a chunk of {len(line)} bytes: the text layer must emit sooner"
    return line
