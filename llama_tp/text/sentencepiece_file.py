"""Llama 2's tokenizer.model: a sentencepiece model, extended by its sibling files."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from llama_tp.text.siblings import CONTROL_PIECE, AddedToken, Siblings
from llama_tp.text.vocabulary import SPACE_MARK, Vocabulary, require_rows, spaced_bytes, within_embedding

# https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
_TRAINER_SPEC, _NORMALIZER_SPEC = 2, 3
_ADD_DUMMY_PREFIX, _REMOVE_EXTRA_WHITESPACES = 3, 4
_TREAT_WHITESPACE_AS_SUFFIX = 24
_NO_DUMMY_PREFIX = bytes([_NORMALIZER_SPEC << 3 | 2, 2, _ADD_DUMMY_PREFIX << 3, 0])
"""Appended to a model, it sets add_dummy_prefix to false: protobuf merges concatenated messages."""


class SentencePieceFile(Vocabulary):
    """Ids from the sentencepiece library, plus the tokens that sibling files add."""

    kind = "sentencepiece"

    def __init__(self, path: Path, data: bytes, siblings: Siblings, embedding_rows: int | None) -> None:
        from sentencepiece import SentencePieceProcessor

        try:
            model = SentencePieceProcessor(model_proto=data)
            declared = _Declared.of(data)
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{path} is not a readable sentencepiece model ({error}); download it again") from None
        if declared.treats_whitespace_as_suffix:
            raise ValueError(
                f"{path} declares treat_whitespace_as_suffix, which no Llama vocabulary has: not supported"
            )
        require_rows(path, model.vocab_size(), embedding_rows)
        added, beyond = within_embedding(siblings.added_tokens, embedding_rows)
        pieces = [model.id_to_piece(i) for i in range(model.vocab_size())]
        _check_added(path, pieces, added)
        special_ids = {
            piece: i
            for i, piece in enumerate(pieces)
            if model.is_control(i)
            or model.is_unknown(i)
            or CONTROL_PIECE.fullmatch(piece)
            or piece in siblings.special_pieces
        } | {token.content: token.id for token in added if token.special}
        table = [b"" if p in special_ids else spaced_bytes(p, is_byte=model.is_byte(i)) for i, p in enumerate(pieces)]
        table += [b""] * (1 + max((token.id for token in added), default=0) - len(table))
        plain = {token.content: token.id for token in added if not token.special}
        for piece, i in plain.items():
            table[i] = spaced_bytes(piece, is_byte=False)
        super().__init__(
            path,
            table,
            special_ids,
            siblings,
            ids={piece: i for i, piece in enumerate(pieces)} | {token.content: token.id for token in added},
            beyond=beyond,
            embedding_rows=embedding_rows,
            bos_id=_known(model.bos_id()),
            eos_id=_known(model.eos_id()),
            unk_id=_known(model.unk_id()),
            drops_leading_space=declared.drops_leading_space,
        )
        self._data = data
        self._model = model
        self._added = plain
        self._added_pattern = re.compile(f"({'|'.join(map(re.escape, sorted(plain, key=len, reverse=True)))})")
        self._is_legacy = bool(siblings.tokenizer_config.get("legacy", False))

    def _encode_plain(self, text: str, *, begins: bool = True) -> list[int]:
        if not self._added:
            return self._encode_pieces(text, begins)
        ids: list[int] = []
        for part in self._added_pattern.split(text):
            if part in self._added:
                ids.append(self._added[part])
            elif part:
                ids += self._encode_pieces(part, begins and not ids)
        return ids

    def _encode_pieces(self, text: str, begins: bool) -> list[int]:
        if begins:
            return self._model.encode(text)
        if self._is_legacy and not text.startswith((" ", SPACE_MARK)):
            text = " " + text  # as transformers does after a special token if tokenizer_config.json says "legacy"
        return self._without_prefix.encode(text)

    @cached_property
    def _without_prefix(self) -> Any:
        """The same model without the leading space."""
        from sentencepiece import SentencePieceProcessor

        return SentencePieceProcessor(model_proto=self._data + _NO_DUMMY_PREFIX)


@dataclass(frozen=True, slots=True)
class _Declared:
    """A model's white space settings, from its normalizer_spec and trainer_spec."""

    drops_leading_space: bool
    treats_whitespace_as_suffix: bool

    @classmethod
    def of(cls, model: bytes) -> _Declared:
        trainer: dict[int, int | bytes] = {}
        normalizer: dict[int, int | bytes] = {_ADD_DUMMY_PREFIX: True, _REMOVE_EXTRA_WHITESPACES: True}
        for number, value in _fields(model):
            if number in (_TRAINER_SPEC, _NORMALIZER_SPEC) and isinstance(value, bytes):
                (trainer if number == _TRAINER_SPEC else normalizer).update(_fields(value))
        return cls(
            # with either flag, sentencepiece's decoder drops one leading space
            drops_leading_space=bool(normalizer[_ADD_DUMMY_PREFIX] or normalizer[_REMOVE_EXTRA_WHITESPACES]),
            treats_whitespace_as_suffix=bool(trainer.get(_TREAT_WHITESPACE_AS_SUFFIX, False)),
        )


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of every field of a protobuf message. ValueError if it is not one."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        wire = key & 7
        if wire == 0:
            value, at = _varint(message, at)
            yield key >> 3, value
            continue
        if wire == 2:
            size, at = _varint(message, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire} at byte {at}")
        yield key >> 3, message[at : at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """A varint (7 bits per byte, lowest first), and where it ends."""
    value = shift = 0
    while True:
        if at >= len(message):
            raise ValueError("it ends within a number")
        value |= (message[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if message[at - 1] < 128:
            return value, at


def _check_added(path: Path, pieces: list[str], added: list[AddedToken]) -> None:
    """ValueError for a token that contradicts the model or needs matching rules that sentencepiece lacks."""
    for token in added:
        if token.single_word or (not token.special and (token.lstrip or token.rstrip)):
            raise ValueError(
                f"{path}: a file next to it adds {token.content!r} with single_word, lstrip or rstrip, which is not "
                "supported with a tokenizer.model; pass the model's tokenizer.json"
            )
        if token.id < len(pieces) and pieces[token.id] != token.content:
            raise ValueError(
                f"{path} has {pieces[token.id]!r} as id {token.id}, but a file next to it says {token.content!r}: "
                "they do not belong together"
            )


def _known(sentencepiece_id: int) -> int | None:
    return None if sentencepiece_id < 0 else sentencepiece_id
