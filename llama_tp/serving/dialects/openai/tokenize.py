"""The queries of tokenize and detokenize, as vLLM has them.

{"prompt": "Hi"} or {"messages": [{"role": "user", "content": "Hi"}]} -> {"count", "max_model_len", "tokens"}
{"tokens": [1, 2]} -> {"prompt": "..."}
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import AfterValidator, WithJsonSchema

from llama_tp.engine.sampling_params import SamplingParams
from llama_tp.serving.dialects.base import Prompts
from llama_tp.serving.dialects.openai.chat import Messages, check_continuation
from llama_tp.serving.dialects.openai.request import Given, given_in
from llama_tp.serving.dialects.openai.types import Detokenized, Tokenized
from llama_tp.serving.dialects.route import ModelRoute
from llama_tp.serving.dialects.tools import ChatTools
from llama_tp.serving.dialects.unsupported import only
from llama_tp.serving.encoding import to_json
from llama_tp.serving.errors import ApiError
from llama_tp.serving.fields import ABSENT, TOKEN_IDS, token_ids
from llama_tp.serving.generation import FieldNames, GenerationRequest
from llama_tp.serving.operation import Operation
from llama_tp.serving.reply_size import check_answer
from llama_tp.serving.strict_model import StrictModel
from llama_tp.text.detokenizer import bytes_with_specials
from llama_tp.text.tokenizer import Tokenizer

_OF_CHATS = ("tools", "add_generation_prompt", "continue_final_message", "chat_template_kwargs")
_NAMES = FieldNames(dialog="messages")
_OF_TOKENS = FieldNames(prompt="tokens")


class TokenizeRequest(StrictModel):
    """A text, or a chat."""

    model: str = ABSENT
    """The name of the model that is served; any other is a 404."""
    prompt: str = ABSENT
    """The text. Either this or messages is required."""
    messages: Messages = ABSENT
    tools: ChatTools = ABSENT
    add_special_tokens: bool = ABSENT
    """Whether a text begins as the model's prompts do, which is the default; not with messages."""
    return_token_strs: bool = False
    """Report the text of each token."""
    add_generation_prompt: bool = ABSENT
    """Whether a chat's prompt ends with the beginning of an answer."""
    continue_final_message: bool = False
    """Whether a chat's last message, which is the assistant's, is left open."""
    chat_template_kwargs: dict[str, Any] = ABSENT
    """Further variables of the chat template."""
    chat_template: only() = ABSENT  # type: ignore[valid-type]
    mm_processor_kwargs: only({}) = ABSENT  # type: ignore[valid-type]
    media_io_kwargs: only({}) = ABSENT  # type: ignore[valid-type]


class DetokenizeRequest(StrictModel):
    """Token ids."""

    model: str = ABSENT
    """The name of the model that is served; any other is a 404."""
    tokens: Annotated[Any, AfterValidator(token_ids), WithJsonSchema(TOKEN_IDS)]
    """The ids, of special tokens too."""


class TokenizeQuery:
    """Counts and lists the tokens of a text, or of a chat's prompt."""

    def __init__(self, route: ModelRoute) -> None:
        self._route = route

    @property
    def operation(self) -> Operation:
        summary = "Count and list the tokens of a text or a chat's prompt, as vLLM does."
        return Operation(id="tokenize", summary=summary, body=TokenizeRequest, answer=Tokenized)

    def answer(self, body: object, prompts: Prompts) -> bytes:
        given = given_in(self._route.validate(TokenizeRequest, body))
        request = _request(given)
        ids = prompts.prompt_ids(request)
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

    @property
    def operation(self) -> Operation:
        summary = "The text of token ids, as vLLM has it."
        return Operation(id="detokenize", summary=summary, body=DetokenizeRequest, answer=Detokenized)

    def answer(self, body: object, prompts: Prompts) -> bytes:
        tokens = self._route.validate(DetokenizeRequest, body).tokens
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
        template_variables=given.get("chat_template_kwargs", {}),
        special_tokens=given.get("add_special_tokens", True),
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
    token_bytes = bytes_with_specials(tokenizer)
    return [token_bytes(token).decode("utf-8", "replace") for token in ids]


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
