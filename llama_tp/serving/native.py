"""The dialect of /predictions/llama: one JSON object in, one JSON object or one JSON line per chunk out.

    {"prompt": "The capital of France is", "max_new_tokens": 50}
    {"dialog": [{"role": "user", "content": "Hi"}], "max_new_tokens": 50, "mode": "chat"}

What can be judged without a tokenizer and without the model's limits is judged by `parse_native`; the rest by
`check_context`, `check_vocabulary`, `check_answer_size` and the chat format. The prompt may be text or token ids. A
field that is null is not given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, FailFast
from pydantic_core import PydanticCustomError

from llama_tp.engine.request import FinishReason, Logprobs, SamplingParams
from llama_tp.serving.schema import (
    ABSENT,
    ApiError,
    LogitBias,
    MaxNewTokens,
    MinNewTokens,
    MinP,
    NumOutputs,
    Penalty,
    RepetitionPenalty,
    Seed,
    StopStrings,
    StopTokenIds,
    StrictModel,
    Temperature,
    TimeoutS,
    TopK,
    TopLogprobs,
    TopP,
    must_be_text,
    parse_json,
    shown,
    to_json,
    token_ids,
    validate,
)

MAX_CHUNK_BYTES = 64 * 1024
"""Bytes of one line of a stream."""
MAX_CHUNK_TOKENS = 64
"""Tokens of one line of a stream; fewer where each of them takes many bytes."""
MAX_ANSWER_BYTES = 6 * 2**20
"""Bytes of an answer that does not stream: a longer one than its max_response_size would end TorchServe's worker."""
MAX_LOGPROBS = 2**15
"""Log probabilities in an answer that does not stream: at about 100 bytes each, half of MAX_ANSWER_BYTES."""
LEAST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON lacks, as it does in OpenAI's API."""

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
    continue_final_message: bool
    """The answer continues the dialog's last message, which is the assistant's."""
    max_new_tokens: int
    max_new_tokens_explicit: bool
    """The request itself asked for max_new_tokens: then it is a promise to keep or refuse, and not clipped."""
    min_new_tokens: int
    """At most max_new_tokens."""
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    """By token id, of which only the upper bound is still unchecked; so it is with stop_token_ids."""
    seed: int | None
    stop: tuple[str, ...]
    """Stop strings; the text layer looks for them."""
    stop_token_ids: tuple[int, ...]
    ignore_eos: bool
    """Of all ids, only stop_token_ids end the answer."""
    logprobs: int | None
    """Report each token's log probability and those of so many most probable ones. None: report none."""
    n: int
    """Outputs for the one prompt."""
    timeout_s: float | None
    stream: bool
    """One JSON line per chunk instead of one answer."""

    @property
    def continues_text(self) -> bool:
        """Whether the answer goes on with text of the request, rather than begin one."""
        if self.dialog is None:
            return True
        return self.continue_final_message and bool(self.dialog[-1][1].strip())

    def sampling_params(self, *, stop_ids: frozenset[int], max_new_tokens: int) -> SamplingParams:
        """How to sample it, with the ids that end an answer by themselves and the max_new_tokens found to fit."""
        return SamplingParams(
            max_new_tokens=max_new_tokens,
            min_new_tokens=self.min_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=self.logit_bias,
            seed=self.seed,
            stop_ids=(frozenset() if self.ignore_eos else stop_ids) | frozenset(self.stop_token_ids),
            n=self.n,
            logprobs=self.logprobs,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What a reply says of one output."""

    index: int | None
    """None where there is but one output."""
    text: str
    ids: Sequence[int]
    logprobs: Sequence[dict[str, Any]] | None
    """A `token_logprobs` for each id. None: not asked for."""
    finish_reason: FinishReason | None
    """None while the output goes on."""
    error: ApiError | None

    def fields(self) -> dict[str, Any]:
        """As a line of a stream says it."""
        every = {
            "index": self.index,
            "text": self.text,
            "ids": self.ids,
            "logprobs": self.logprobs,
            "finish_reason": self.finish_reason,
            "error": self.error and self.error.fields(),
        }
        return {name: value for name, value in every.items() if value is not None}


def _text_or_ids(prompt: object) -> str | tuple[int, ...]:
    if not isinstance(prompt, (str, list)):
        raise PydanticCustomError("invalid_type", "must be a string or a list of token ids")
    if not prompt:
        raise PydanticCustomError("empty_prompt", "must not be empty")
    return prompt if isinstance(prompt, str) else token_ids(prompt)


_TO_CHAT = 'to chat, send the messages as dialog, as in {"dialog": [{"role": "user", "content": "Hi"}]}'
_ELSEWHERE = {
    "messages": _TO_CHAT,
    "model": f"leave it out, the URL names the model; {_TO_CHAT}",
    "system": "make it the first message of dialog, with the role system",
    "max_completion_tokens": "did you mean max_new_tokens?",
    **dict.fromkeys(("input", "inputs", "text"), "send the text as prompt"),
}
"""What the fields of other APIs are called here, where the names do not tell."""


class _Message(StrictModel):
    role: str
    content: str


def _some_messages(messages: list[_Message]) -> tuple[tuple[str, str], ...]:
    if not messages:
        raise PydanticCustomError("empty_messages", "must hold at least one message")
    return tuple((message.role, message.content) for message in messages)


class _Body(StrictModel):
    hints = _ELSEWHERE

    prompt: Annotated[Any, AfterValidator(_text_or_ids)] = ABSENT
    dialog: Annotated[list[_Message], FailFast(), AfterValidator(_some_messages)] = ABSENT
    mode: Annotated[Mode, BeforeValidator(must_be_text)] = ABSENT
    continue_final_message: bool = False
    max_new_tokens: MaxNewTokens = ABSENT
    min_new_tokens: MinNewTokens = 0
    temperature: Temperature = ABSENT
    top_p: TopP = ABSENT
    top_k: TopK = ABSENT
    min_p: MinP = ABSENT
    repetition_penalty: RepetitionPenalty = 1.0
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    logit_bias: LogitBias = ABSENT
    seed: Seed = ABSENT
    stop: StopStrings = ABSENT
    stop_token_ids: StopTokenIds = ()
    ignore_eos: bool = False
    logprobs: bool = False
    top_logprobs: TopLogprobs = 0
    n: NumOutputs = 1
    timeout_s: TimeoutS = ABSENT
    stream: bool = False


def parse_native(body: object, defaults: NativeDefaults) -> NativeRequest:
    """The request in a body (bytes, text, or already parsed JSON). ApiError with status 400 if it is none.

    A prompt is text_completion and a dialog is chat; `mode` may say so too, but may not say otherwise.
    """
    payload = parse_json(body)
    fields = validate(_Body, payload)
    given: dict[str, Any] = {name: getattr(fields, name) for name in fields.model_fields_set}
    _check_pairs(given)
    return NativeRequest(
        mode=_mode(payload, given, defaults),
        prompt=given.get("prompt"),
        dialog=given.get("dialog"),
        continue_final_message=fields.continue_final_message,
        max_new_tokens=given.get("max_new_tokens", max(defaults.max_new_tokens, fields.min_new_tokens)),
        max_new_tokens_explicit="max_new_tokens" in given,
        min_new_tokens=fields.min_new_tokens,
        temperature=given.get("temperature", defaults.temperature),
        top_p=given.get("top_p", defaults.top_p),
        top_k=given.get("top_k", defaults.top_k),
        min_p=given.get("min_p", defaults.min_p),
        repetition_penalty=fields.repetition_penalty,
        presence_penalty=fields.presence_penalty,
        frequency_penalty=fields.frequency_penalty,
        logit_bias=given.get("logit_bias", {}),
        seed=given.get("seed", defaults.seed),
        stop=tuple(given.get("stop", ())),
        stop_token_ids=fields.stop_token_ids,
        ignore_eos=fields.ignore_eos,
        logprobs=fields.top_logprobs if fields.logprobs else None,
        n=fields.n,
        timeout_s=fields.timeout_s,
        stream=fields.stream,
    )


def _mode(payload: Mapping[str, Any], given: dict[str, Any], defaults: NativeDefaults) -> Mode:
    """The mode that the fields of a request agree on."""
    if "prompt" in given and "dialog" in given:
        raise ApiError(400, "conflicting_fields", "prompt and dialog are both given; send one of them", "dialog")
    if "prompt" not in given and "dialog" not in given:
        if null := next((name for name in ("prompt", "dialog") if name in payload), None):
            message = f"{null} must not be null; send a prompt, or a dialog to chat"
            raise ApiError(400, "invalid_type", message, null)
        needed = "dialog" if given.get("mode", defaults.mode) == "chat" else "prompt"
        raise ApiError(400, "missing_field", f"{needed} is missing; send a prompt, or a dialog to chat", needed)
    present = "dialog" if "dialog" in given else "prompt"
    mode: Mode = "chat" if present == "dialog" else "text_completion"
    if given.get("mode", mode) != mode:
        message = f"mode={shown(given['mode'])} contradicts {present}, which is for {shown(mode)}; leave mode out"
        raise ApiError(400, "conflicting_fields", message, "mode")
    return mode


def _check_pairs(given: dict[str, Any]) -> None:
    """ApiError where two fields contradict each other."""
    least, most = given.get("min_new_tokens", 0), given.get("max_new_tokens")
    if most is not None and least > most:
        message = f"min_new_tokens={least} must be at most max_new_tokens={most}"
        raise ApiError(400, "invalid_value", message, "min_new_tokens")
    if given.get("continue_final_message") and "dialog" not in given:
        message = "continue_final_message=true needs a dialog; a prompt is continued anyway"
        raise ApiError(400, "conflicting_fields", message, "continue_final_message")
    if "top_logprobs" in given and not given.get("logprobs"):
        message = f"top_logprobs={given['top_logprobs']} needs logprobs=true, which is not given"
        raise ApiError(400, "conflicting_fields", message, "top_logprobs")


def check_context(
    num_prompt_tokens: int,
    max_new_tokens: int,
    max_seq_len: int,
    explicit: bool,
    param: str = "prompt",
    limit_param: str = "max_new_tokens",
    min_new_tokens: int = 0,
) -> int:
    """The max_new_tokens to use. ApiError if prompt and generated tokens do not fit; a default is clipped instead, to
    no less than min_new_tokens.

    param and limit_param are what the dialect calls the prompt and max_new_tokens.
    """
    room = max_seq_len - num_prompt_tokens
    if room < 1:
        message = (
            f"{param} has {num_prompt_tokens} tokens, but the context of {max_seq_len} tokens must hold at least one "
            f"generated token as well; send at most {max_seq_len - 1}"
        )
        raise ApiError(400, "context_length_exceeded", message, param)
    wanted, limit_param = (max_new_tokens, limit_param) if explicit else (min_new_tokens, "min_new_tokens")
    if wanted > room:
        message = (
            f"{limit_param}={wanted} does not fit after {param} of {num_prompt_tokens} tokens into the "
            f"context of {max_seq_len} tokens; ask for at most {room}"
        )
        raise ApiError(400, "context_length_exceeded", message, limit_param)
    return min(max_new_tokens, room)


def check_outputs(n: int, max_waiting: int) -> None:
    """ApiError if so many outputs could never wait at a time."""
    if n > max_waiting:
        message = f"n={n} must be at most {max_waiting}, the outputs that may wait here (handler.max_waiting)"
        raise ApiError(400, "invalid_value", message, "n")


def check_token_ids(ids: Sequence[int], vocab_size: int, param: str = "prompt") -> None:
    """ApiError for the first id that is not in the vocabulary."""
    if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
        at = next(index for index, token in enumerate(ids) if not 0 <= token < vocab_size)
        message = f"{param}[{at}]={ids[at]} is not a token id; the vocabulary is 0 to {vocab_size - 1}"
        raise ApiError(400, "token_out_of_range", message, f"{param}[{at}]")


def check_vocabulary(request: NativeRequest, vocab_size: int) -> None:
    """ApiError for the first id in a request that is not in the vocabulary."""
    if isinstance(request.prompt, tuple):
        check_token_ids(request.prompt, vocab_size)
    check_token_ids(request.stop_token_ids, vocab_size, "stop_token_ids")
    for token, bias in request.logit_bias.items():
        if token >= vocab_size:
            name = f"logit_bias.{token}"
            message = f"{name}={bias} is not for a token id; the vocabulary is 0 to {vocab_size - 1}"
            raise ApiError(400, "token_out_of_range", message, name)


def check_answer_size(request: NativeRequest, max_new_tokens: int) -> None:
    """ApiError if an answer in one piece may hold too many log probabilities."""
    if request.stream or request.logprobs is None:
        return
    most = request.n * max_new_tokens * (1 + request.logprobs)
    if most > MAX_LOGPROBS:
        message = (
            f"n={request.n} outputs of max_new_tokens={max_new_tokens} tokens with top_logprobs={request.logprobs} are "
            f"up to {most} log probabilities, but one answer holds at most {MAX_LOGPROBS}; set stream, or ask for less"
        )
        raise ApiError(400, "answer_too_large", message, "logprobs")


def chunk_tokens(request: NativeRequest, longest_token: int) -> int:
    """How many tokens, of at most so many bytes each, fit into a line of a stream in any case.

    A byte is a control character's \\u0000 in a text and a number of three digits in a list. Room is left for what
    was held back of a stop string.
    """
    num_records = 0 if request.logprobs is None else 1 + request.logprobs
    num_bytes = 96 + 6 * longest_token + num_records * (96 + 10 * longest_token)
    return max(1, min(MAX_CHUNK_TOKENS, (MAX_CHUNK_BYTES - 4096) // num_bytes))


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """What a request has cost."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def token_logprobs(token_id: int, logprobs: Logprobs, token_bytes: Callable[[int], bytes]) -> dict[str, Any]:
    """What a reply says of how probable a token was, with the names of OpenAI's chat API."""

    def record(token_id: int, logprob: float) -> dict[str, Any]:
        raw = token_bytes(token_id)
        text = raw.decode("utf-8", "replace")
        return {"id": token_id, "token": text, "bytes": list(raw), "logprob": max(logprob, LEAST_LOGPROB)}

    return {**record(token_id, logprobs.chosen), "top_logprobs": [record(*one) for one in logprobs.top]}


def answer(parts: Sequence[Part], usage: Mapping[str, int]) -> bytes:
    """The whole reply to a request that does not stream. ApiError if it is too large for a reply."""
    choices = [part.fields() for part in parts]
    for choice in choices:
        del choice["ids"]
    body = to_json({**(choices[0] if len(choices) == 1 else {"choices": choices}), "usage": usage}) + b"\n"
    if len(body) > MAX_ANSWER_BYTES:
        message = f"the answer has {len(body)} bytes, but may have at most {MAX_ANSWER_BYTES}; set stream to get it"
        raise ApiError(400, "answer_too_large", message, "stream")
    return body


def lines(parts: Sequence[Part], usage: Mapping[str, int] | None = None) -> bytes:
    """Lines of a stream: new text and the ids of the new tokens, either of which may be empty. usage ends the last."""
    records = [part.fields() for part in parts]
    if usage is not None:
        records[-1]["usage"] = usage
    return b"".join(map(_line, records))


def stream_error(error: ApiError) -> bytes:
    """The line that ends a stream that has failed after its status was sent."""
    return error.body() + b"\n"


def _line(record: dict[str, Any]) -> bytes:
    line = to_json(record) + b"\n"
    assert len(line) <= MAX_CHUNK_BYTES, f"a chunk of {len(line)} bytes: the text layer must emit sooner"
    return line
