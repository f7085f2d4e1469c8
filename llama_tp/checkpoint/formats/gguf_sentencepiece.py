"""SentencePiece's file format, written from a list of pieces.

The messages are written by hand: sentencepiece's own classes for them need the protobuf package, which nothing else
here does. https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

_NORMAL, _UNKNOWN, _BYTE = 1, 2, 6
_TYPES = range(1, 7)
"""GGUF numbers the types of pieces as SentencePiece does."""
_PIECES, _TRAINER_SPEC, _NORMALIZER_SPEC = 1, 2, 3
_MODEL_TYPE, _VOCAB_SIZE, _BYTE_FALLBACK = 3, 4, 35
_UNK_PIECE, _BOS_PIECE, _EOS_PIECE = 45, 46, 47
_BPE = 2
_NAME, _ADD_DUMMY_PREFIX, _REMOVE_EXTRA_WHITESPACES, _ESCAPE_WHITESPACES = 1, 3, 4, 5


def sentencepiece_model(
    pieces: Sequence[str],
    scores: Sequence[float],
    types: Sequence[float],
    *,
    bos: str | None,
    eos: str | None,
    adds_space: bool,
    merges_spaces: bool,
) -> bytes:
    """A tokenizer.model of BPE, as Llama 1 and 2 have it. ValueError says what SentencePiece would not take.

    adds_space: whether a text begins with a space that it does not have
    merges_spaces: whether several spaces become one, and those at the ends none
    """
    if len(scores) != len(pieces):
        raise ValueError(f"{len(pieces)} tokens with {len(scores)} scores")
    if odd := sorted(set(types) - set(_TYPES)):
        raise ValueError(f"a token of type {odd[0]}")
    if (unknown := types.count(_UNKNOWN)) != 1:
        raise ValueError(f"{unknown} unknown tokens, expected 1")
    if (num_bytes := types.count(_BYTE)) not in (0, 256):
        raise ValueError(f"{num_bytes} tokens for bytes, expected 256 or none")
    ranks = {score for piece, score, kind in zip(pieces, scores, types, strict=True) if kind == _NORMAL and piece[1:]}
    if len(ranks) == 1:  # llama.cpp's converter writes such files if it has only a tokenizer.json
        raise ValueError("all tokens have the same score, so the order of merges is lost")
    trainer = [
        _number(_MODEL_TYPE, _BPE),
        _number(_VOCAB_SIZE, len(pieces)),
        _number(_BYTE_FALLBACK, num_bytes > 0),
        _text(_UNK_PIECE, pieces[types.index(_UNKNOWN)]),
        *([] if bos is None else [_text(_BOS_PIECE, bos)]),
        *([] if eos is None else [_text(_EOS_PIECE, eos)]),
    ]
    normalizer = [
        _text(_NAME, "identity"),
        _number(_ADD_DUMMY_PREFIX, adds_space),
        _number(_REMOVE_EXTRA_WHITESPACES, merges_spaces),
        _number(_ESCAPE_WHITESPACES, True),
    ]
    entries = [
        _message(_PIECES, _text(1, piece) + _float(2, score) + _number(3, int(kind)))
        for piece, score, kind in zip(pieces, scores, types, strict=True)
    ]
    return b"".join(
        [*entries, _message(_TRAINER_SPEC, b"".join(trainer)), _message(_NORMALIZER_SPEC, b"".join(normalizer))]
    )


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _float(field: int, value: float) -> bytes:
    return _varint(field << 3 | 5) + struct.pack("<f", value)


def _text(field: int, value: str) -> bytes:
    return _message(field, value.encode())


def _message(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    """7 bits per byte, lowest first."""
    groups = [value & 127]
    while value := value >> 7:
        groups.append(value & 127)
    return bytes([*(group | 128 for group in groups[:-1]), groups[-1]])
