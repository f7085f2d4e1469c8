"""Llama 3's tokenizer.model: a base64 token and its rank per line."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator
from pathlib import Path

from llama_tp.text.siblings import AddedToken, Siblings
from llama_tp.text.vocabulary import Vocabulary, require_rows, within_embedding

# Llama 3, https://github.com/meta-llama/llama-models (the names of 3.1)
_LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_NUM_RANKS = 128_000
_LLAMA4_NUM_RANKS = 200_000
_LLAMA3_NUM_SPECIALS = 256
_LLAMA3_SPECIALS = (
    *("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"),
    *("<|finetune_right_pad_id|>", "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eom_id|>", "<|eot_id|>", "<|python_tag|>"),
)
# tiktoken is quadratic in the length of a run, and its regex overflows on very long text. Same limits as Meta's code.
_TIKTOKEN_MAX_CHARS = 400_000
_TIKTOKEN_MAX_RUN = 25_000


class TiktokenFile(Vocabulary):
    """Llama 3's vocabulary: 256 specials follow the last rank. The file contains neither them nor its pattern."""

    kind = "tiktoken"

    def __init__(self, path: Path, data: bytes, siblings: Siblings, embedding_rows: int | None) -> None:
        from tiktoken import Encoding

        table = _read_ranks(path, data)
        if len(table) > _LLAMA3_NUM_RANKS:
            whose = "Llama 4's vocabulary" if len(table) == _LLAMA4_NUM_RANKS else "a vocabulary that is not Llama 3's"
            raise ValueError(
                f"{path} is {whose} ({len(table)} tokens; Llama 3's has {_LLAMA3_NUM_RANKS}), whose pattern and "
                "special tokens are not supported; pass the model's tokenizer.json"
            )
        names = [*_LLAMA3_SPECIALS]
        names += [f"<|reserved_special_token_{2 + i}|>" for i in range(_LLAMA3_NUM_SPECIALS - len(names))]
        own = {name: len(table) + i for i, name in enumerate(names)}
        require_rows(path, len(table) + len(own), embedding_rows)
        added, beyond = within_embedding(siblings.added_tokens, embedding_rows)
        special_ids = own | {token.content: _special_id(path, token, len(table)) for token in added}
        self._encoding = Encoding(
            "llama3",
            pat_str=_LLAMA3_PATTERN,
            mergeable_ranks={raw: rank for rank, raw in enumerate(table)},
            special_tokens=own,
        )
        super().__init__(
            path,
            table + [b""] * (1 + max(special_ids.values()) - len(table)),
            special_ids,
            siblings,
            ids=special_ids,
            beyond=beyond,
            embedding_rows=embedding_rows,
            bos_id=own["<|begin_of_text|>"],
            eos_id=own["<|end_of_text|>"],
        )

    def _encode_plain(self, text: str, *, begins: bool = True) -> list[int]:
        chunks = (text[i : i + _TIKTOKEN_MAX_CHARS] for i in range(0, len(text), _TIKTOKEN_MAX_CHARS))
        return [
            token_id
            for chunk in chunks
            for part in split_long_runs(chunk, _TIKTOKEN_MAX_RUN)
            for token_id in self._encoding.encode_ordinary(part)
        ]


def split_long_runs(text: str, max_run: int) -> Iterator[str]:
    """Cut the text so that no part has a run of more than max_run space or non-space characters."""
    start = 0
    for run in re.finditer(r"\s+|\S+", text):
        for cut in range(run.start() + max_run, run.end(), max_run):
            yield text[start:cut]
            start = cut
    yield text[start:]


def _special_id(path: Path, token: AddedToken, num_ranks: int) -> int:
    """The id of a token from a sibling file: a new special, or a reserved one renamed."""
    if token.special and token.id >= num_ranks:
        return token.id
    raise ValueError(
        f"{path}: the files next to it add {token.content!r} as {'' if token.special else 'plain text with '}id "
        f"{token.id}, but its {num_ranks} text ids are fixed; pass the tokenizer.json that belongs to these files"
    )


def _read_ranks(path: Path, data: bytes) -> list[bytes]:
    """The tokens of a tiktoken rank file, by rank."""
    ranks: dict[int, bytes] = {}
    lines = data.rstrip().splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            token, rank = line.split()
            ranks[int(rank)] = base64.b64decode(token, validate=True)
        except (ValueError, binascii.Error):
            raise ValueError(f"{path}, line {number}: not a base64 token and its rank; download it again") from None
    if sorted(ranks) != list(range(len(lines))) or len(set(ranks.values())) != len(lines):
        raise ValueError(f"{path} is damaged: it must have exactly one token per rank 0, 1, 2, ...; download it again")
    if missing := {bytes([byte]) for byte in range(256)} - set(ranks.values()):
        raise ValueError(f"{path} is damaged: {len(missing)} of the 256 single bytes are missing; download it again")
    return [ranks[rank] for rank in range(len(ranks))]
