"""The queries of tokenize and detokenize, as vLLM has them.

{"prompt": "Hi"} or {"messages": [{"role": "user", "content": "Hi"}]} -> {"count", "max_model_len", "tokens"}
{"tokens": [1, 2]} -> {"prompt": "..."}
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import AfterValidator

from llama_tp.engine.sampling_params import SamplingParams
from llama_tp.serving.dialects.base import Prompts
from llama_tp.serving.dialects.openai.chat import Messages, check_continuation
from llama_tp.serving.dialects.openai.request import Given, given_in
from llama_tp.serving.dialects.route import ModelRoute
from llama_tp.serving.dialects.tools import ChatTools
from llama_tp.serving.dialects.unsupported import only
from llama_tp.serving.encoding import to_json
from llama_tp.serving.errors import ApiError
from llama_tp.serving.fields import ABSENT, token_ids
from llama_tp.serving.generation import FieldNames, GenerationRequest
from llama_tp.serving.reply_size import check_answer
from llama_tp.serving.strict_model import StrictModel
from llama_tp.text.tokenizer import Tokenizer

_OF_CHATS = ("tools", "add_generation_prompt", "continue_final_message")
_NAMES = FieldNames(dialog="messages")
_OF_TOKENS = FieldNames(prompt="tokens")


class _Tokenize(StrictModel):
    model: str = ABSENT
    prompt: str = ABSENT
    messages: Messages = ABSENT
    tools: ChatTools = ABSENT
    add_special_tokens: bool = ABSENT
    return_token_strs: bool = False
    add_generation_prompt: bool = ABSENT
    continue_final_message: bool = False
    chat_template: only() = ABSENT  # type: ignore[valid-type]
    chat_template_kwargs: only({}) = ABSENT  # type: ignore[valid-type]
    mm_processor_kwargs: only({}) = ABSENT  # type: ignore[valid-type]
    media_io_kwargs: only({}) = ABSENT  # type: ignore[valid-type]


class _Detokenize(StrictModel):
    model: str = ABSENT
    tokens: Annotated[Any, AfterValidator(token_ids)]


class TokenizeQuery:
    """Counts and lists the tokens of a text, or of a chat's prompt."""

    def __init__(self, route: ModelRoute) -> None:
        self._route = route

    def answer(self, body: object, prompts: Prompts) -> bytes:
        given = given_in(self._route.validate(_Tokenize, body))
        request = _request(given)
        ids = prompts.prompt_ids(request, special_tokens=given.get("add_special_tokens", True))
        strings = _texts(prompts.tokenizer, ids) if given.get("return_token_strs") else None
        answer = {"count": len(ids), "max_model_len": prompts.max_seq_len, "tokens": ids, "token_strs": strings}
        encoded = to_json(answer) + b"\n"
        check_answer(encoded, param=request.prompt_name(), remedy="send a shorter text")
        return encoded

    def error(self, error: ApiError) -> bytes:
        return error.body()


class DetokenizeQuery:
    """The text of token ids, special ones included."""

    def __init__(self, route: ModelRoute) -> None:
        self._route = route

    def answer(self, body: object, prompts: Prompts) -> bytes:
        tokens = self._route.validate(_Detokenize, body).tokens
        ids = prompts.prompt_ids(GenerationRequest(prompts=(tokens,), sampling=SamplingParams(), names=_OF_TOKENS))
        encoded = to_json({"prompt": _text(prompts.tokenizer, ids)}) + b"\n"
        check_answer(encoded, param="tokens", remedy="send fewer of them")
        return encoded

    def error(self, error: ApiError) -> bytes:
        return error.body()


def _request(given: Given) -> GenerationRequest:
    """The request with this prompt. ApiError where fields contradict each other."""
    _check_pairs(given)
    return GenerationRequest(
        prompts=(given["prompt"],) if "prompt" in given else (),
        dialog=given.get("messages"),
        continue_final_message=given.get("continue_final_message", False),
        add_generation_prompt=given.get("add_generation_prompt", True),
        tools=given.get("tools", ()),
        sampling=SamplingParams(),
        names=_NAMES,
    )


def _check_pairs(given: Given) -> None:
    if "prompt" in given and "messages" in given:
        raise ApiError(400, "conflicting_fields", "prompt and messages are both given; send one of them", "prompt")
    if "prompt" not in given and "messages" not in given:
        raise ApiError(400, "missing_field", "prompt is missing; send a prompt or messages", "prompt")
    if "messages" in given:
        if given.get("add_special_tokens"):
            message = "add_special_tokens=true is supported with prompt only: chat formats write their special tokens"
            raise ApiError(400, "unsupported_value", message, "add_special_tokens")
        check_continuation(given)
    elif other := next((name for name in _OF_CHATS if given.get(name)), None):
        raise ApiError(400, "conflicting_fields", f"{other} needs messages; with a prompt, leave it out", other)


def _texts(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """The text of each token: that of a special token is its name, and broken UTF-8 becomes U+FFFD."""
    names = {token: piece for piece, token in tokenizer.special_ids.items()}
    return [names.get(token) or tokenizer.token_bytes(token).decode("utf-8", "replace") for token in ids]


def _text(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of the ids, with the names of special tokens among it."""
    names = {token: piece for piece, token in tokenizer.special_ids.items()}
    text = [""]
    start = 0
    for at, token in enumerate(ids):
        if token in names:
            text += [tokenizer.decode(ids[start:at]), names[token]]
            start = at + 1
    return "".join([*text, tokenizer.decode(ids[start:])])
