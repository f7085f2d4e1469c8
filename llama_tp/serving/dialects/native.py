"""The dialect of /predictions/llama: one JSON object in, one JSON object or one JSON line per chunk out.

    {"prompt": "The capital of France is", "max_new_tokens": 50}
    {"dialog": [{"role": "user", "content": "Hi"}], "max_new_tokens": 50, "mode": "chat"}

The prompt may be text or token ids. A null field counts as omitted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, FailFast, Field, WithJsonSchema, create_model
from pydantic_core import PydanticCustomError

from llama_tp.engine.request import Logprobs
from llama_tp.engine.sampling_params import SamplingParams
from llama_tp.serving.dialects.base import Accepted
from llama_tp.serving.dialects.native_types import Answer, AnswerOfSeveral, Line
from llama_tp.serving.dialects.structure import FIELDS, grammar_in
from llama_tp.serving.encoding import MIN_LOGPROB, shown, to_json
from llama_tp.serving.errors import ApiError, ErrorBody
from llama_tp.serving.fields import (
    ABSENT,
    KNOB_TYPES,
    TEXT_OR_IDS,
    FewMessages,
    LogitBias,
    MaxNewTokensOrNone,
    MinNewTokens,
    NumOutputs,
    PromptLogprobs,
    Seed,
    StopStrings,
    StopTokenIds,
    TimeoutS,
    TopLogprobs,
    must_be_text,
    token_ids,
)
from llama_tp.serving.generation import FieldNames, GenerationRequest, Mode, OutputDelta, RequestDefaults, Usage
from llama_tp.serving.operation import Operation
from llama_tp.serving.reply_size import MAX_CHUNK_BYTES, check_answer, chunk_tokens
from llama_tp.serving.strict_json import parse_json
from llama_tp.serving.strict_model import StrictModel, validate
from llama_tp.text.dialog import Message
from llama_tp.text.tokenizer import Tokenizer


class NativeDialect:
    """The Dialect of the model's own route."""

    def __init__(self, defaults: RequestDefaults) -> None:
        self._defaults = defaults

    @property
    def operation(self) -> Operation:
        return Operation(
            id="generate",
            summary="Continue a prompt, or answer a dialog.",
            body=_Body,
            answer=Answer | AnswerOfSeveral,
            chunk=Line | ErrorBody,
            chunk_type="application/jsonl",
        )

    def parse(self, body: object) -> GenerationRequest:
        return parse_native(body, self._defaults)

    def replies(self, accepted: Accepted, tokenizer: Tokenizer, longest_token: int) -> NativeReplies:
        return NativeReplies(accepted.request, accepted.prompts[0], tokenizer.token_bytes, longest_token)

    def error(self, error: ApiError) -> bytes:
        return error.body()


def _text_or_ids(prompt: object) -> str | tuple[int, ...]:
    if not isinstance(prompt, (str, list)):
        raise PydanticCustomError("invalid_type", "must be a string or a list of token ids")
    if not prompt:
        raise PydanticCustomError("empty_prompt", "must not be empty")
    return prompt if isinstance(prompt, str) else token_ids(prompt)


_TO_CHAT = 'to chat, send the messages as dialog, as in {"dialog": [{"role": "user", "content": "Hi"}]}'
_HINTS = {
    "messages": _TO_CHAT,
    "model": f"leave it out, the URL names the model; {_TO_CHAT}",
    "system": "make it the first message of dialog, with the role system",
    "max_completion_tokens": "did you mean max_new_tokens?",
    **dict.fromkeys(("input", "inputs", "text"), "send the text as prompt"),
}
"""What to use instead of other APIs' fields, where names are too different to suggest it."""


class DialogMessage(StrictModel):
    """One turn of a dialog."""

    role: str
    """system, user or assistant, unless the chat format knows others."""
    content: str
    """Always plain text, even if it looks like markup."""


def _some_messages(messages: list[DialogMessage]) -> tuple[Message, ...]:
    if not messages:
        raise PydanticCustomError("empty_messages", "must hold at least one message")
    return tuple(Message(message.role, message.content) for message in messages)


class _Fields(StrictModel):
    hints = _HINTS

    prompt: Annotated[Any, AfterValidator(_text_or_ids), WithJsonSchema(TEXT_OR_IDS)] = ABSENT
    """Text to continue, or its token ids. Either this or dialog is required."""
    dialog: Annotated[
        list[DialogMessage],
        FailFast(),
        FewMessages,
        AfterValidator(_some_messages),
        Field(json_schema_extra={"minItems": 1}),
    ] = ABSENT
    """Messages to answer."""
    mode: Annotated[Mode, BeforeValidator(must_be_text)] = ABSENT
    """Implied by prompt or dialog."""
    continue_final_message: bool = False
    """Continue the dialog's last message, which is the assistant's."""
    max_new_tokens: MaxNewTokensOrNone = ABSENT
    min_new_tokens: MinNewTokens = 0
    logit_bias: LogitBias = ABSENT
    seed: Seed = ABSENT
    stop: StopStrings = ABSENT
    stop_token_ids: StopTokenIds = ()
    ignore_eos: bool = False
    """Whether the model's own end tokens do not end the answer."""
    logprobs: bool = False
    """Report each token's log probability."""
    top_logprobs: TopLogprobs = 0
    prompt_logprobs: PromptLogprobs = ABSENT
    n: NumOutputs = 1
    timeout_s: TimeoutS = ABSENT
    stream: bool = False
    """One line of JSON per chunk, instead of a single object."""


_NAMES = FieldNames()
_STRUCTURE = ("response_format", "structured_outputs")
_KNOBS: dict[str, Any] = {
    **{name: (kind, ABSENT) for name, kind in KNOB_TYPES.items()},
    **{name: (FIELDS[name], ABSENT) for name in _STRUCTURE},
}
_Body = create_model("NativeRequest", __base__=_Fields, **_KNOBS)


def parse_native(body: object, defaults: RequestDefaults) -> GenerationRequest:
    """The request in a body (bytes, text, or already parsed JSON). ApiError with status 400 if it is invalid.

    A prompt means text_completion and a dialog means chat; `mode` is optional, but must agree.
    """
    payload = parse_json(body)
    fields = validate(_Body, payload)
    given: dict[str, Any] = {name: getattr(fields, name) for name in fields.model_fields_set}
    _check_pairs(given)
    _check_mode(payload, given, defaults.mode)
    grammar, grammar_name = grammar_in(given, min_tokens="min_new_tokens")
    sampling = SamplingParams(
        max_new_tokens=given.get("max_new_tokens", max(defaults.max_new_tokens, fields.min_new_tokens)),
        min_new_tokens=fields.min_new_tokens,
        **{name: given.get(name, defaults.sampling[name]) for name in KNOB_TYPES},
        logit_bias=given.get("logit_bias", {}),
        seed=given.get("seed", defaults.seed),
        n=fields.n,
        logprobs=fields.top_logprobs if fields.logprobs else None,
        prompt_logprobs=fields.prompt_logprobs,
    )
    return GenerationRequest(
        prompts=(given["prompt"],) if "prompt" in given else (),
        dialog=given.get("dialog"),
        continue_final_message=fields.continue_final_message,
        grammar=grammar,
        sampling=sampling,
        max_new_tokens_explicit="max_new_tokens" in given,
        stop=tuple(given.get("stop", ())),
        stop_token_ids=fields.stop_token_ids,
        ignore_eos=fields.ignore_eos,
        timeout_s=fields.timeout_s,
        stream=fields.stream,
        names=_NAMES if grammar is None else FieldNames(grammar=grammar_name),
    )


def _check_mode(payload: Mapping[str, Any], given: dict[str, Any], default: Mode) -> None:
    """ApiError unless there is exactly one of prompt and dialog, and mode agrees with it."""
    if "prompt" in given and "dialog" in given:
        raise ApiError(400, "conflicting_fields", "prompt and dialog are both given; send one of them", "dialog")
    if "prompt" not in given and "dialog" not in given:
        if null := next((name for name in ("prompt", "dialog") if name in payload), None):
            message = f"{null} must not be null; send a prompt, or a dialog to chat"
            raise ApiError(400, "invalid_type", message, null)
        needed = "dialog" if given.get("mode", default) == "chat" else "prompt"
        raise ApiError(400, "missing_field", f"{needed} is missing; send a prompt, or a dialog to chat", needed)
    present = "dialog" if "dialog" in given else "prompt"
    mode = "chat" if present == "dialog" else "text_completion"
    if given.get("mode", mode) != mode:
        message = f"mode={shown(given['mode'])} contradicts {present}, which is for {shown(mode)}; leave mode out"
        raise ApiError(400, "conflicting_fields", message, "mode")


def _check_pairs(given: dict[str, Any]) -> None:
    """ApiError where two fields contradict each other."""
    least, most = given.get("min_new_tokens", 0), given.get("max_new_tokens")
    if most is not None and least > most:
        message = f"min_new_tokens={least} must be at most max_new_tokens={most}"
        raise ApiError(400, "invalid_value", message, "min_new_tokens")
    if most == 0 and "prompt_logprobs" not in given:
        message = "max_new_tokens=0 must be at least 1, or needs prompt_logprobs"
        raise ApiError(400, "invalid_value", message, "max_new_tokens")
    if given.get("stream") and "prompt_logprobs" in given:
        message = "prompt_logprobs is not possible in a stream; leave out one of prompt_logprobs and stream"
        raise ApiError(400, "conflicting_fields", message, "prompt_logprobs")
    if given.get("continue_final_message") and "dialog" not in given:
        message = "continue_final_message=true needs a dialog; a prompt is continued anyway"
        raise ApiError(400, "conflicting_fields", message, "continue_final_message")
    if "top_logprobs" in given and not given.get("logprobs"):
        message = f"top_logprobs={given['top_logprobs']} needs logprobs=true, which is not given"
        raise ApiError(400, "conflicting_fields", message, "top_logprobs")


class NativeReplies:
    """The Replies to one request."""

    chunk_type = "application/jsonl"

    def __init__(
        self,
        request: GenerationRequest,
        prompt: Sequence[int],
        token_bytes: Callable[[int], bytes],
        longest_token: int,
    ) -> None:
        self.chunk_tokens = chunk_tokens(request, longest_token)
        self._prompt = prompt
        self._has_index = request.sampling.n > 1
        self._token_bytes = token_bytes

    def chunk(self, deltas: Sequence[OutputDelta], usage: Usage | None = None) -> bytes:
        """Lines of a stream: new text and the ids of the new tokens, either of which may be empty. `usage` goes into
        the last."""
        records = [self._record(delta) for delta in deltas]
        if usage is not None:
            records[-1]["usage"] = usage.fields()
        return b"".join(map(_line, records))

    def answer(self, outputs: Sequence[OutputDelta], usage: Usage) -> bytes:
        choices = [self._record(output) for output in outputs]
        for choice in choices:
            del choice["ids"]
        answer: dict[str, Any] = {"choices": choices} if self._has_index else choices[0]
        scores = next((one.prompt_logprobs for one in outputs if one.prompt_logprobs is not None), None)
        if scores is not None:
            answer["prompt_logprobs"] = self._prompt_logprobs(scores)
        body = to_json({**answer, "usage": usage.fields()}) + b"\n"
        check_answer(body)
        return body

    def error(self, error: ApiError) -> bytes:
        """One line, also at the end of a stream that fails after its status was sent."""
        return error.body() + b"\n"

    def _prompt_logprobs(self, scores: Sequence[Logprobs]) -> list[dict[str, Any]]:
        """One for each of the prompt's tokens; the first has no log probability."""
        first = token_logprobs(self._prompt[0], Logprobs(0.0, ()), self._token_bytes) | {"logprob": None}
        others = zip(self._prompt[1:], scores, strict=True)
        return [first, *(token_logprobs(token, one, self._token_bytes) for token, one in others)]

    def _record(self, delta: OutputDelta) -> dict[str, Any]:
        """The fields of one output in a line of a stream."""
        logprobs = None
        if delta.logprobs is not None:
            pairs = zip(delta.ids, delta.logprobs, strict=True)
            logprobs = [token_logprobs(token, one, self._token_bytes) for token, one in pairs]
        fields = {
            "index": delta.index if self._has_index else None,
            "text": delta.text,
            "ids": delta.ids,
            "logprobs": logprobs,
            "finish_reason": delta.finish_reason,
            "error": delta.error and delta.error.fields(),
        }
        return {name: value for name, value in fields.items() if value is not None}


def token_logprobs(token_id: int, logprobs: Logprobs, token_bytes: Callable[[int], bytes]) -> dict[str, Any]:
    """A token's log probabilities in a reply, with the field names of OpenAI's chat API."""

    def record(token_id: int, logprob: float) -> dict[str, Any]:
        raw = token_bytes(token_id)
        text = raw.decode("utf-8", "replace")
        return {"id": token_id, "token": text, "bytes": list(raw), "logprob": max(logprob, MIN_LOGPROB)}

    return {**record(token_id, logprobs.chosen), "top_logprobs": [record(*one) for one in logprobs.top]}


def _line(record: dict[str, Any]) -> bytes:
    line = to_json(record) + b"\n"
    assert len(line) <= MAX_CHUNK_BYTES, f"a chunk of {len(line)} bytes: the text layer must emit sooner"
    return line
