"""Log probabilities in OpenAI's two forms, and in vLLM's form for prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llama_tp.engine.request import Logprobs
from llama_tp.serving.encoding import MIN_LOGPROB
from llama_tp.text.detokenizer import Detokenizer, bytes_with_specials
from llama_tp.text.tokenizer import Tokenizer


def chat_logprobs(ids: Sequence[int], logprobs: Sequence[Logprobs], names: TokenNames) -> dict[str, Any]:
    """As v1/chat/completions has them: one object per token."""

    def record(token_id: int, logprob: float) -> dict[str, Any]:
        raw = names.token_bytes(token_id)
        token = names.as_id(token_id) or raw.decode("utf-8", "replace")
        return {"token": token, "logprob": max(logprob, MIN_LOGPROB), "bytes": list(raw)}

    content = [
        {**record(token_id, one.chosen), "top_logprobs": [record(*alternative) for alternative in one.top]}
        for token_id, one in zip(ids, logprobs, strict=True)
    ]
    return {"content": content, "refusal": None}


def prompt_logprobs(
    ids: Sequence[int], scores: Sequence[Logprobs], num_top: int, names: TokenNames
) -> list[dict[str, Any] | None]:
    """As vLLM has them: an object per token of the prompt, by token id, and null for the first."""

    def record(token_id: int, logprob: float, rank: int) -> dict[str, Any]:
        text = names.as_id(token_id) or names.token_bytes(token_id).decode("utf-8", "replace")
        return {"logprob": max(logprob, MIN_LOGPROB), "rank": rank, "decoded_token": text}

    records: list[dict[str, Any] | None] = [None]
    for token_id, one in zip(ids[1:], scores, strict=True):
        tops = {str(other): record(other, value, at) for at, (other, value) in enumerate(one.top[:num_top], 1)}
        records.append({str(token_id): record(token_id, one.chosen, one.rank), **tops})
    return records


class TokenNames:
    """How tokens appear in log probabilities: as text, special ones as their pieces, or, if `as_ids`, as ids."""

    def __init__(self, tokenizer: Tokenizer, *, as_ids: bool = False) -> None:
        self.token_bytes = bytes_with_specials(tokenizer)
        self._as_ids = as_ids

    def as_id(self, token_id: int) -> str | None:
        """The token's id as vLLM writes it; None unless that is requested."""
        return f"token_id:{token_id}" if self._as_ids else None

    def of(self, token_id: int) -> str:
        """The token's id, or its text, or its bytes if these are not whole characters, as OpenAI writes them."""
        if (name := self.as_id(token_id)) is not None:
            return name
        raw = self.token_bytes(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


class CompletionLogprobs:
    """As v1/completions has them: parallel lists. One for each output, because a token's offset depends on those before
    it."""

    def __init__(self, names: TokenNames, text: Detokenizer, num_top: int) -> None:
        """`text`: decodes the tokens to come, of which the first has the offset 0."""
        self._name = names.of
        self._num_top = num_top
        self._text = text
        self._offset = 0

    def next(self, ids: Sequence[int], logprobs: Sequence[Logprobs | None]) -> tuple[str, dict[str, Any]]:
        """Of the next tokens, which are the output's, or an echoed prompt's before them: their text, and their log
        probabilities. Offsets are in characters of that text from its beginning on."""
        texts, offsets = [], []
        for token_id in ids:
            offsets.append(self._offset)
            texts.append(self._text.push(token_id))
            self._offset += len(texts[-1])
        return "".join(texts), {
            "tokens": [self._name(token_id) for token_id in ids],
            "token_logprobs": [one and max(one.chosen, MIN_LOGPROB) for one in logprobs],
            "top_logprobs": [one and self._top(token_id, one) for token_id, one in zip(ids, logprobs, strict=True)],
            "text_offset": offsets,
        }

    def _top(self, token_id: int, one: Logprobs) -> dict[str, float]:
        tops = ((token_id, one.chosen), *one.top[: self._num_top])
        return {self._name(other): max(value, MIN_LOGPROB) for other, value in tops}
