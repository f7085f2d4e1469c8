"""The common base of vocabularies: a table of bytes per id, and the guard between text and specials."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

from llama_tp.text.siblings import AddedToken, Siblings

SPACE_MARK = "▁"  # sentencepiece's space inside a piece

_STOP_PIECES = ("</s>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|im_end|>", "<|endoftext|>")


def require_well_formed(text: str) -> None:
    """ValueError if the text contains a lone surrogate, which UTF-8, and so any tokenizer, cannot represent."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text has a lone surrogate U+{ord(text[error.start]):04X} at character {error.start}; "
            "send well-formed Unicode"
        ) from None


class Vocabulary(ABC):
    """A tokenizer file with its sibling files; see `llama_tp.text.tokenizer.Tokenizer` for the contract.

    `ids` maps every piece to its id, `special_ids` those that text never produces, `beyond` those without a row in the
    model's embedding. bos_id, eos_id: from the tokenizer file itself; sibling files override them.
    """

    kind: str

    def __init__(
        self,
        path: Path,
        table: list[bytes],
        special_ids: Mapping[str, int],
        siblings: Siblings,
        *,
        ids: Mapping[str, int],
        beyond: Mapping[str, int],
        embedding_rows: int | None,
        bos_id: int | None,
        eos_id: int | None,
        unk_id: int | None = None,
        drops_leading_space: bool = False,
    ) -> None:
        self.vocab_size = len(table)
        self.special_ids = special_ids
        self.bos_id = siblings.token_id("bos", {**ids, **beyond}, bos_id)
        self.eos_id = siblings.token_id("eos", {**ids, **beyond}, eos_id)
        for name, token_id in (("BOS", self.bos_id), ("EOS", self.eos_id)):
            if embedding_rows is not None and token_id is not None and token_id >= embedding_rows:
                raise ValueError(
                    f"{path}: {name} has id {token_id}, but the model's embedding has {embedding_rows} rows: "
                    "the tokenizer is not this model's"
                )
        self.adds_bos = self.bos_id is not None and siblings.adds_bos is not False
        self.drops_leading_space = drops_leading_space
        self.chat_template = siblings.chat_template
        self.chat_template_file = siblings.chat_template_file
        self.beyond_embedding = beyond
        stops = {special_ids[p] for p in _STOP_PIECES if p in special_ids} | siblings.stop_ids
        if self.eos_id is not None:
            stops.add(self.eos_id)
        self.stop_ids = frozenset(i for i in stops if embedding_rows is None or i < embedding_rows)
        self._table = table
        self._forbidden = {id_: piece for piece, id_ in special_ids.items() if id_ != unk_id}
        self._strips = {token.content: token for token in siblings.added_tokens if token.lstrip or token.rstrip}
        piece_of = {id_: piece for piece, id_ in special_ids.items()}
        own = {"bos_token": self.bos_id, "eos_token": self.eos_id, "unk_token": unk_id}
        self.template_variables: Mapping[str, str | list[str]] = {
            **{name: piece_of[id_] for name, id_ in own.items() if id_ in piece_of},
            **siblings.template_variables,
        }

    @abstractmethod
    def _encode_plain(self, text: str, *, begins: bool = True) -> list[int]:
        """Ids of a non-empty text; `begins` is False if something precedes it."""

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        require_well_formed(text)
        ids = self._guard(self._encode_plain(text)) if text else []
        return [*self._edge("bos", bos), *ids, *self._edge("eos", eos)]

    def encode_rendered(self, parts: Sequence[str]) -> list[int]:
        ids: list[int] = []
        for at, part in enumerate(parts):
            if at % 2:
                ids.append(self.special_ids[part])
                continue
            if at > 0 and (before := self._strips.get(parts[at - 1])) and before.rstrip:
                part = part.lstrip()
            if at + 1 < len(parts) and (after := self._strips.get(parts[at + 1])) and after.lstrip:
                part = part.rstrip()
            if part:
                require_well_formed(part)
                ids += self._guard(self._encode_plain(part, begins=not ids))
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        raw = b"".join(map(self.token_bytes, ids))
        if self.drops_leading_space:
            raw = raw.removeprefix(b" ")
        return raw.decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        return self._table[token_id] if 0 <= token_id < self.vocab_size else b""

    def _guard(self, ids: list[int]) -> list[int]:
        """The ids, with any special ids that text produced spelled out."""
        if forged := self._forbidden.keys() & set(ids):
            spelled = {special: self._spell(special) for special in forged}
            return [unit for i in ids for unit in spelled.get(i, [i])]
        return ids

    def _edge(self, name: str, wanted: bool) -> list[int]:
        if not wanted:
            return []
        token_id = self.bos_id if name == "bos" else self.eos_id
        if token_id is None:
            raise ValueError(f"{name}=True, but this {self.kind} vocabulary has no {name.upper()} token")
        return [token_id]

    def _spell(self, special_id: int) -> list[int]:
        """Ids that spell a special token's name in the vocabulary's characters and bytes."""
        id_of = self._id_of_bytes
        ids: list[int] = []
        for char in self._forbidden[special_id].replace(SPACE_MARK, " "):
            raw = char.encode()
            units = [raw] if raw in id_of else [bytes([byte]) for byte in raw]
            ids += (id_of[unit] for unit in units if unit in id_of)
        return ids

    @cached_property
    def _id_of_bytes(self) -> dict[bytes, int]:
        # the last of several equal entries wins: sentencepiece lists characters after bytes
        return {raw: token_id for token_id, raw in enumerate(self._table) if 0 < len(raw) <= 4}


def within_embedding(
    tokens: Sequence[AddedToken], embedding_rows: int | None
) -> tuple[list[AddedToken], dict[str, int]]:
    """The added tokens within this embedding, and piece -> id of the others."""
    if embedding_rows is None:
        return list(tokens), {}
    kept = [token for token in tokens if token.id < embedding_rows]
    return kept, {token.content: token.id for token in tokens if token.id >= embedding_rows}


def require_rows(path: Path, num_ids: int, embedding_rows: int | None) -> None:
    """ValueError if a vocabulary, without added tokens, has more ids than the embedding has rows."""
    if embedding_rows is not None and num_ids > embedding_rows:
        raise ValueError(
            f"{path} has {num_ids} tokens but the model's embedding has {embedding_rows} rows: "
            "the tokenizer is not this model's"
        )


def spaced_bytes(piece: str, *, is_byte: bool) -> bytes:
    return bytes([int(piece[3:5], 16)]) if is_byte else piece.replace(SPACE_MARK, " ").encode()
