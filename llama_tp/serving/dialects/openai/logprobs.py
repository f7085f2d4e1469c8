"""Log probabilities in OpenAI's two forms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llama_tp.engine.request import Logprobs
from llama_tp.serving.encoding import MIN_LOGPROB
from llama_tp.text.detokenizer import Detokenizer
from llama_tp.text.tokenizer import Tokenizer


def chat_logprobs(
    ids: Sequence[int], logprobs: Sequence[Logprobs], token_bytes: Callable[[int], bytes]
) -> dict[str, Any]:
    """As v1/chat/completions has them: one object per token."""

    def record(token_id: int, logprob: float) -> dict[str, Any]:
        raw = token_bytes(token_id)
        return {"token": raw.decode("utf-8", "replace"), "logprob": max(logprob, MIN_LOGPROB), "bytes": list(raw)}

    content = [
        {**record(token_id, one.chosen), "top_logprobs": [record(*alternative) for alternative in one.top]}
        for token_id, one in zip(ids, logprobs, strict=True)
    ]
    return {"content": content, "refusal": None}


class CompletionLogprobs:
    """As v1/completions has them: parallel lists. One for each output, because a token's offset depends on those before
    it."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._text = Detokenizer(tokenizer, prompt)
        self._offset = 0

    def next(self, ids: Sequence[int], logprobs: Sequence[Logprobs]) -> dict[str, Any]:
        """Of the output's next tokens. Their offsets are in characters of the output's text."""
        offsets = []
        for token_id in ids:
            offsets.append(self._offset)
            self._offset += len(self._text.push(token_id))
        return {
            "tokens": [self._name(token_id) for token_id in ids],
            "token_logprobs": [max(one.chosen, MIN_LOGPROB) for one in logprobs],
            "top_logprobs": [
                {self._name(other): max(value, MIN_LOGPROB) for other, value in ((token_id, one.chosen), *one.top)}
                for token_id, one in zip(ids, logprobs, strict=True)
            ],
            "text_offset": offsets,
        }

    def _name(self, token_id: int) -> str:
        """The token's text, or its bytes if these are not whole characters, as OpenAI writes them."""
        raw = self._token_bytes(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
