"""Text to token ids and back, for the three kinds of vocabulary that Llama checkpoints use.

Knows nothing about dialogs, models or requests. Two invariants hold for every kind: user text never produces a special
id, and `decode` is the concatenation of `token_bytes`, decoded as UTF-8.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from llama_tp.file_kind import HEAD_BYTES, read_small, why_no_content
from llama_tp.text.sentencepiece_file import SentencePieceFile
from llama_tp.text.siblings import Siblings
from llama_tp.text.tiktoken_file import TiktokenFile
from llama_tp.text.tokenizer_files import find_tokenizer
from llama_tp.text.tokenizer_json import TokenizerJson

_MAX_BYTES = 512 << 20
"""Of a tokenizer's file. Those of 256,000 tokens have 35 MB."""


class Tokenizer(Protocol):
    """A vocabulary: plain text <-> token ids."""

    kind: str
    """"sentencepiece", "tiktoken" or "tokenizer.json"."""
    vocab_size: int
    """The highest id plus one, including specials. An embedding may have more rows."""
    bos_id: int | None
    eos_id: int | None
    stop_ids: frozenset[int]
    """Every id that ends a turn or a text."""
    special_ids: Mapping[str, int]
    """Piece -> id of tokens that text never produces and that decode to nothing."""
    adds_bos: bool
    """Whether a completion prompt begins with BOS."""
    drops_leading_space: bool
    """Whether the first space of a decoded text is an artifact of the vocabulary, to be dropped."""
    beyond_embedding: Mapping[str, int]
    """Piece -> id of added tokens without an embedding row. In text they are plain text."""
    chat_template: str | None
    """The tokenizer's jinja template."""
    chat_template_file: str | None
    """The name of its file."""
    template_variables: Mapping[str, str | list[str]]
    """bos_token, pad_token and so on, as named in the template."""

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """Ids of plain text. ValueError for lone surrogates, and for a BOS or EOS that the vocabulary lacks.

        Text never produces a special id, except the unknown id in a vocabulary without byte fallback.
        """

    def encode_rendered(self, parts: Sequence[str]) -> list[int]:
        """Ids of a rendered template: text, special piece, text, special piece, ..., text; a text may be empty.

        The parts are one text: a vocabulary's leading space is added only before the first.
        """

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; specials are skipped, broken UTF-8 becomes U+FFFD."""

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes of a token in a text, O(1): b"" for specials and for ids outside the vocabulary."""


def load_tokenizer(path: str | Path, *, embedding_rows: int | None = None) -> Tokenizer:
    """Load a tokenizer file, or a folder's tokenizer.json (preferred: it has added tokens) or tokenizer.model.

    The kind is detected from the content; sibling files are read from the same folder. embedding_rows: rows of the
    model's embedding; added tokens beyond it are ignored, and a larger vocabulary is rejected.
    FileNotFoundError or ValueError names the path and the remedy.
    """
    file = find_tokenizer(path)
    data = read_small(file, _MAX_BYTES)
    head = data[:HEAD_BYTES].removeprefix(b"\xef\xbb\xbf").lstrip()
    if problem := why_no_content(head):
        raise ValueError(f"{file} {problem}")
    siblings = Siblings(file.parent)
    if head[:1] == b"{":
        return TokenizerJson(file, data, siblings, embedding_rows)
    if re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?(\n|$)", head):
        return TiktokenFile(file, data, siblings, embedding_rows)
    if data[:1] == b"\n":  # protobuf: field 1, length-delimited
        return SentencePieceFile(file, data, siblings, embedding_rows)
    raise ValueError(
        f"{file} is neither a sentencepiece model, nor a tiktoken rank file, nor a tokenizer.json; "
        "pass the tokenizer file that came with the checkpoint"
    )
