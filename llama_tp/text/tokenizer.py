"""Text to token ids and back, for the three vocabularies that Llama checkpoints come with.

Knows nothing of dialogs, models or requests. Two promises hold for every kind:
user text never yields a special id, and `decode` is the concatenation of `token_bytes`, read as UTF-8.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from llama_tp.file_kind import HEAD_BYTES, why_no_content
from llama_tp.text.sentencepiece_file import SentencePieceFile
from llama_tp.text.siblings import Siblings
from llama_tp.text.tiktoken_file import TiktokenFile
from llama_tp.text.tokenizer_files import find_tokenizer
from llama_tp.text.tokenizer_json import TokenizerJson


class Tokenizer(Protocol):
    """A vocabulary: plain text <-> token ids."""

    kind: str
    """"sentencepiece", "tiktoken" or "tokenizer.json"."""
    vocab_size: int
    """One more than the highest id, specials included. An embedding may have more rows than that."""
    bos_id: int | None
    eos_id: int | None
    stop_ids: frozenset[int]
    """Every id that ends a turn or a text."""
    special_ids: Mapping[str, int]
    """Piece -> id of the tokens that no text spells and that decode to nothing."""
    adds_bos: bool
    """Whether a completion prompt begins with BOS."""
    drops_leading_space: bool
    """Whether one leading space of a decoded text is an artefact of the vocabulary, and dropped."""
    beyond_embedding: Mapping[str, int]
    """Piece -> id of added tokens that the model has no embedding for. In a text they are text."""
    chat_template: str | None
    """The jinja template that came with the tokenizer."""
    chat_template_file: str | None
    """The name of the file that it is in."""
    template_variables: Mapping[str, str | list[str]]
    """bos_token, pad_token and so on, as the template refers to them."""

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """Ids of plain text. ValueError for lone surrogates, and for a BOS or EOS that the vocabulary lacks.

        No special id comes of the text, save the unknown id in a vocabulary without bytes to fall back to.
        """

    def encode_rendered(self, parts: Sequence[str]) -> list[int]:
        """Ids of a rendered template: text, special piece, text, special piece, ..., text; a text may be empty.

        One text in parts, not many texts: what a vocabulary puts in front of a text, it puts in front of the first.
        """

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; specials are skipped, broken UTF-8 becomes U+FFFD."""

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes that a token contributes to a text, O(1): b"" for specials and for ids outside of the vocabulary."""


def load_tokenizer(path: str | Path, *, embedding_rows: int | None = None) -> Tokenizer:
    """Load a tokenizer file, or the tokenizer.json (preferred: it knows added tokens) or tokenizer.model of a folder.

    The kind is found from the content; the files that belong to it are looked for beside it. With the number of rows
    of the model's embedding, added tokens beyond it are ignored, and a larger vocabulary is refused.
    FileNotFoundError or ValueError names the path and the remedy.
    """
    file = find_tokenizer(path)
    data = file.read_bytes()
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
        "give the tokenizer file that came with the checkpoint"
    )
