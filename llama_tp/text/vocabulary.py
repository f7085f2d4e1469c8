"""Tables of tokens in Meta's two file formats, and what every vocabulary has in common."""

from __future__ import annotations

import base64
import binascii
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

SPACE_MARK = "▁"  # how sentencepiece writes a space inside a piece

# Tokens with these names steer a model even where the vocabulary declares them as plain text.
CONTROL_PIECE = re.compile(r"▁?(<[|｜].+[|｜]>|</?s>|<unk>|<pad>)", re.DOTALL)
_STOP_PIECES = ("</s>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|im_end|>", "<|endoftext|>")

# Llama 3, https://github.com/meta-llama/llama-models (the names of 3.1)
_LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_NUM_SPECIALS = 256
_LLAMA3_SPECIALS = (
    *("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"),
    *("<|finetune_right_pad_id|>", "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eom_id|>", "<|eot_id|>", "<|python_tag|>"),
)
# tiktoken is quadratic in the length of a run and its regex overflows on very long text; Meta cuts at the same places.
_TIKTOKEN_MAX_CHARS = 400_000
_TIKTOKEN_MAX_RUN = 25_000


def require_well_formed(text: str) -> None:
    """ValueError if the text holds a lone surrogate, which no UTF-8 and so no tokenizer can express."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text has a lone surrogate U+{ord(text[error.start]):04X} at character {error.start}; "
            "send well-formed Unicode"
        ) from None


class Vocabulary(ABC):
    """What the kinds share: a table of bytes per id, and the guard between text and specials."""

    kind: str

    def __init__(
        self,
        table: list[bytes],
        special_ids: Mapping[str, int],
        *,
        bos_id: int | None,
        eos_id: int | None,
        unk_id: int | None = None,
        drops_leading_space: bool = False,
    ) -> None:
        self.vocab_size = len(table)
        self.special_ids = special_ids
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.adds_bos = bos_id is not None
        self.drops_leading_space = drops_leading_space
        self.chat_template: str | None = None
        self.stop_ids = frozenset(special_ids[p] for p in _STOP_PIECES if p in special_ids)
        if eos_id is not None:
            self.stop_ids |= {eos_id}
        self._table = table
        self._forbidden = {id_: piece for piece, id_ in special_ids.items() if id_ != unk_id}

    @abstractmethod
    def _encode_plain(self, text: str) -> list[int]: ...

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        require_well_formed(text)
        ids = self._encode_plain(text) if text else []
        if forged := self._forbidden.keys() & set(ids):
            spelled = {special: self._spell(special) for special in forged}
            ids = [unit for i in ids for unit in spelled.get(i, [i])]
        return [*self._edge("bos", bos), *ids, *self._edge("eos", eos)]

    def decode(self, ids: Sequence[int]) -> str:
        raw = b"".join(map(self.token_bytes, ids))
        if self.drops_leading_space:
            raw = raw.removeprefix(b" ")
        return raw.decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        return self._table[token_id] if 0 <= token_id < self.vocab_size else b""

    def _edge(self, name: str, wanted: bool) -> list[int]:
        if not wanted:
            return []
        token_id = self.bos_id if name == "bos" else self.eos_id
        if token_id is None:
            raise ValueError(f"{name}=True, but this {self.kind} vocabulary has no {name.upper()} token")
        return [token_id]

    def _spell(self, special_id: int) -> list[int]:
        """The ids that write the name of a special token with the vocabulary's characters and bytes."""
        id_of = self._id_of_bytes
        ids: list[int] = []
        for char in self._forbidden[special_id].replace(SPACE_MARK, " "):
            raw = char.encode()
            units = [raw] if raw in id_of else [bytes([byte]) for byte in raw]
            ids += (id_of[unit] for unit in units if unit in id_of)
        return ids

    @cached_property
    def _id_of_bytes(self) -> dict[bytes, int]:
        # of equals the later wins: sentencepiece has its characters behind its bytes
        return {raw: token_id for token_id, raw in enumerate(self._table) if 0 < len(raw) <= 4}


class SentencePieceFile(Vocabulary):
    """Llama 2's tokenizer.model; ids as the sentencepiece library gives them."""

    kind = "sentencepiece"

    def __init__(self, path: Path, data: bytes) -> None:
        from sentencepiece import SentencePieceProcessor

        try:
            model = SentencePieceProcessor(model_proto=data)
        except RuntimeError as error:
            raise ValueError(f"{path} is not a readable sentencepiece model ({error}); download it again") from None
        pieces = [model.id_to_piece(i) for i in range(model.vocab_size())]
        special_ids = {
            piece: i
            for i, piece in enumerate(pieces)
            if model.is_control(i) or model.is_unknown(i) or CONTROL_PIECE.fullmatch(piece)
        }
        table = [b"" if p in special_ids else spaced_bytes(p, is_byte=model.is_byte(i)) for i, p in enumerate(pieces)]
        spaced = next((i for i, p in enumerate(pieces) if p.startswith(SPACE_MARK) and table[i]), None)
        super().__init__(
            table,
            special_ids,
            bos_id=_known(model.bos_id()),
            eos_id=_known(model.eos_id()),
            unk_id=_known(model.unk_id()),
            drops_leading_space=spaced is not None and not model.decode([spaced]).startswith(" "),
        )
        self._model = model

    def _encode_plain(self, text: str) -> list[int]:
        return self._model.encode(text)


class TiktokenFile(Vocabulary):
    """Llama 3's tokenizer.model: lines of a base64 token and its rank; 256 specials follow the last rank."""

    kind = "tiktoken"

    def __init__(self, path: Path, data: bytes) -> None:
        from tiktoken import Encoding

        table = _read_ranks(path, data)
        names = [*_LLAMA3_SPECIALS]
        names += [f"<|reserved_special_token_{2 + i}|>" for i in range(_LLAMA3_NUM_SPECIALS - len(names))]
        special_ids = {name: len(table) + i for i, name in enumerate(names)}
        self._encoding = Encoding(
            "llama3",
            pat_str=_LLAMA3_PATTERN,
            mergeable_ranks={raw: rank for rank, raw in enumerate(table)},
            special_tokens=special_ids,
        )
        super().__init__(
            table + [b""] * len(names),
            special_ids,
            bos_id=special_ids["<|begin_of_text|>"],
            eos_id=special_ids["<|end_of_text|>"],
        )

    def _encode_plain(self, text: str) -> list[int]:
        chunks = (text[i : i + _TIKTOKEN_MAX_CHARS] for i in range(0, len(text), _TIKTOKEN_MAX_CHARS))
        return [
            token_id
            for chunk in chunks
            for part in split_long_runs(chunk, _TIKTOKEN_MAX_RUN)
            for token_id in self._encoding.encode_ordinary(part)
        ]


def split_long_runs(text: str, max_run: int) -> Iterator[str]:
    """Cut the text so that no part has more than max_run successive characters that are all space or all not."""
    start = 0
    for run in re.finditer(r"\s+|\S+", text):
        for cut in range(run.start() + max_run, run.end(), max_run):
            yield text[start:cut]
            start = cut
    yield text[start:]


def spaced_bytes(piece: str, *, is_byte: bool) -> bytes:
    return bytes([int(piece[3:5], 16)]) if is_byte else piece.replace(SPACE_MARK, " ").encode()


def _known(sentencepiece_id: int) -> int | None:
    return None if sentencepiece_id < 0 else sentencepiece_id


def _read_ranks(path: Path, data: bytes) -> list[bytes]:
    """The tokens of a tiktoken rank file, in the order of their ranks."""
    ranks: dict[int, bytes] = {}
    lines = data.rstrip().splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            token, rank = line.split()
            ranks[int(rank)] = base64.b64decode(token, validate=True)
        except (ValueError, binascii.Error):
            raise ValueError(f"{path}, line {number}: not a base64 token and its rank; download it again") from None
    if sorted(ranks) != list(range(len(lines))) or len(set(ranks.values())) != len(lines):
        raise ValueError(f"{path} is damaged: not one token for each rank 0, 1, 2, ...; download it again")
    if missing := {bytes([byte]) for byte in range(256)} - set(ranks.values()):
        raise ValueError(f"{path} is damaged: {len(missing)} of the 256 single bytes are missing; download it again")
    return [ranks[rank] for rank in range(len(ranks))]
