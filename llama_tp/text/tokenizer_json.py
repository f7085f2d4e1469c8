"""tokenizer.json, the file format of the tokenizers library.

The library finds special tokens by name anywhere, even in user text. So it is given names that no text can contain:
specials are found only where we write them, by the library's own rules.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llama_tp.file_kind import shown
from llama_tp.text.siblings import AddedToken, Siblings, parse_json
from llama_tp.text.vocabulary import Vocabulary, require_rows, require_well_formed, within_embedding

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_BOS_PIECES = ("<|begin_of_text|>", "<s>")
_EOS_PIECES = ("<|end_of_text|>", "</s>", "<|im_end|>", "<|endoftext|>")
_NONCE = secrets.token_hex(8)


class TokenizerJson(Vocabulary):
    """A tokenizer.json, with BOS, EOS and chat settings from its sibling files."""

    kind = "tokenizer.json"

    def __init__(self, path: Path, data: bytes, siblings: Siblings, embedding_rows: int | None) -> None:
        from tokenizers import Tokenizer as Library

        definition = parse_json(path, data)
        if not isinstance(definition.get("model"), dict):
            if "vocab" in definition and "config" in definition:
                remedy = "pass the model's tokenizer.json, or convert its Hugging Face form"
                raise ValueError(f"{path} is Mistral's tekken.json, which is not supported; {remedy}")
            raise ValueError(f"{path} is JSON but not a tokenizer.json: it has no 'model'; pass the tokenizer's file")
        try:
            added, beyond = within_embedding(_added_tokens(path, definition, siblings), embedding_rows)
            names = {token.content: _hidden_name(token.id) for token in added if token.special}
            library = Library.from_str(json.dumps(_renamed(definition, added, names, beyond)))
        except _Unsupported as error:
            raise ValueError(str(error)) from None
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{path} is not a readable tokenizer.json ({shown(error)}); download it again") from None
        library.no_truncation()
        library.no_padding()
        _require_ids(path, library, added, names)

        piece_of_name = {name: piece for piece, name in names.items()}
        ids = {piece_of_name.get(name, name): i for name, i in library.get_vocab().items()}
        require_rows(path, 1 + max(ids.values()), embedding_rows)
        special_ids = {piece: ids[piece] for piece in names}
        decoder = _Decoder.of(path, library)
        plain = {token.content for token in added}
        table = [b""] * (1 + max(ids.values()))
        for piece, i in ids.items():
            if piece not in special_ids:
                table[i] = decoder.bytes_of_added(piece) if piece in plain else decoder.bytes_of(piece)

        super().__init__(
            path,
            table,
            special_ids,
            siblings,
            ids=ids,
            beyond=beyond,
            embedding_rows=embedding_rows,
            bos_id=next((ids[piece] for piece in _BOS_PIECES if piece in ids), None),
            eos_id=next((ids[piece] for piece in _EOS_PIECES if piece in ids), None),
            unk_id=ids.get(definition["model"].get("unk_token") or ""),
            drops_leading_space=decoder.drops_leading_space,
        )
        self._library = library
        self._names = names
        if siblings.adds_bos is None:
            first = library.encode("a", add_special_tokens=True).ids[:1]
            self.adds_bos = self.bos_id is not None and first == [self.bos_id]

    def _encode_plain(self, text: str, *, begins: bool = True) -> list[int]:
        return self._library.encode(text, add_special_tokens=False).ids

    def encode_rendered(self, parts: Sequence[str]) -> list[int]:
        """All parts at once: the library decides which part begins the text and what white space tokens consume."""
        texts, specials = parts[::2], parts[1::2]
        for text in texts:
            require_well_formed(text)
        written = "".join(self._names[part] if at % 2 else part for at, part in enumerate(parts))
        ids = self._library.encode(written, add_special_tokens=False).ids
        expected = [self.special_ids[piece] for piece in specials]
        found = [i for i in ids if i in self._forbidden]
        if found != [i for i in expected if i in self._forbidden]:
            # The library misses some tokens declared as normalized, and would encode the hidden name.
            return super().encode_rendered(parts)
        return ids


class _Unsupported(ValueError):
    """A readable file that is not supported or contradicts its sibling files."""


def _added_tokens(path: Path, definition: Mapping[str, Any], siblings: Siblings) -> list[AddedToken]:
    """Added tokens of the file and its sibling files, by id."""
    special = siblings.special_pieces | {token.content for token in siblings.added_tokens if token.special}
    tokens = {
        fields["content"]: AddedToken.of(fields["id"], fields, special=fields["content"] in special)
        for fields in definition.get("added_tokens") or []
        if fields["content"]
    }
    for token in siblings.added_tokens:
        known = tokens.setdefault(token.content, token)
        if known.id != token.id:
            raise _Unsupported(f"{path} has {token.content!r} as id {known.id}, but a file next to it says {token.id}")
    for piece, i in _entries(definition["model"].get("vocab") or {}):
        if piece in special and piece not in tokens:
            tokens[piece] = AddedToken(i, piece, special=True)
    return sorted(tokens.values(), key=lambda token: token.id)


def _entries(vocab: Mapping[str, int] | Sequence[Sequence[Any]]) -> Iterable[tuple[str, int]]:
    """(piece, id) of a model's vocabulary, which lists pieces with ids or, for Unigram, with scores."""
    return vocab.items() if isinstance(vocab, Mapping) else ((entry[0], i) for i, entry in enumerate(vocab))


def _hidden_name(token_id: int) -> str:
    """An unguessable name for a special token, between noncharacters."""
    return f"\U0010ffff{_NONCE}.{token_id}\U0010ffff"


def _renamed(
    definition: Mapping[str, Any], added: Sequence[AddedToken], names: Mapping[str, str], beyond: Mapping[str, int]
) -> dict[str, Any]:
    """The definition with these added tokens under these names, without the tokens beyond the embedding."""
    model = dict(definition["model"])
    vocab = model.get("vocab") or {}
    touched = {piece for piece, _ in _entries(vocab) if piece in names or piece in beyond}
    if touched and isinstance(vocab, Mapping):
        model["vocab"] = {names.get(piece, piece): i for piece, i in vocab.items() if piece not in beyond}
    elif touched:
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocab if piece not in beyond]
    if touched and "merges" in model:
        model["merges"] = [merge for merge in model["merges"] if touched.isdisjoint(_pieces_of(merge))]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    tokens = [{**asdict(token), "content": names.get(token.content, token.content)} for token in added]
    return {**definition, "model": model, "added_tokens": tokens}


def _pieces_of(merge: str | Sequence[str]) -> tuple[str, str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right, left + right


def _require_ids(path: Path, library: Any, added: Sequence[AddedToken], names: Mapping[str, str]) -> None:
    """ValueError if the library assigns an added token a different id: it numbers them without gaps."""
    for token in added:
        actual = library.token_to_id(names.get(token.content, token.content))
        if actual != token.id:
            raise ValueError(
                f"{path}: the added token {token.content!r} should have id {token.id}, but the vocabulary continues at "
                f"{actual}; the file is incomplete, download it again"
            )


class _Decoder:
    """Converts pieces to bytes by the decoder steps that tokenizer.json declares."""

    def __init__(self, steps: Sequence[Mapping[str, Any]]) -> None:
        """_Unsupported for steps that look beyond a single piece."""
        types = [step["type"] for step in steps]
        self.drops_leading_space = False
        self._is_byte_level = "ByteLevel" in types
        self._falls_back = "ByteFallback" in types
        self._replaced: list[tuple[str, str]] = []
        if self._is_byte_level:
            self._require(steps, {"ByteLevel", "ByteFallback", "Fuse"})
            self._byte_of = _byte_level_alphabet()
            return
        self._require(steps, {"Replace", "Metaspace", "ByteFallback", "Fuse", "Strip"})
        for at, step in enumerate(steps):
            if step["type"] == "Metaspace":
                self._replaced.append((step["replacement"], " "))
                # The library drops all leading spaces of the first piece, even those of the original text.
                self.drops_leading_space = step["prepend_scheme"] != "never"
            elif step["type"] == "Replace":
                pattern = step["pattern"].get("String")
                if pattern is None:
                    raise _Unsupported(
                        f"the decoder step {json.dumps(step)}; the pattern of a Replace must be a String"
                    )
                self._replaced.append((pattern, step["content"]))
            elif step["type"] == "Strip":
                if (step["content"], step["start"], step["stop"]) != (" ", 1, 0) or "Fuse" not in types[:at]:
                    raise _Unsupported(
                        f"the decoder step {json.dumps(step)}; a Strip must remove one leading space from the text"
                    )
                self.drops_leading_space = True

    @classmethod
    def of(cls, path: Path, library: Any) -> _Decoder:
        """The library's decoder; if it has none, the inverse of its pre-tokenizer."""
        declared = library.decoder or library.pre_tokenizer
        steps = list(_flatten(json.loads(declared.__getstate__()))) if declared else []
        if not library.decoder:
            steps = [step for step in steps if step["type"] in ("ByteLevel", "Metaspace")]
        try:
            return cls(steps)
        except _Unsupported as error:
            raise ValueError(f"{path} has {error}") from None

    def bytes_of(self, piece: str) -> bytes:
        if self._is_byte_level:
            is_spelled = all(char in self._byte_of for char in piece)
            return bytes(self._byte_of[char] for char in piece) if is_spelled else piece.encode()
        if self._falls_back and (byte := _BYTE_PIECE.fullmatch(piece)):
            return bytes([int(byte[1], 16)])
        for pattern, content in self._replaced:
            piece = piece.replace(pattern, content)
        return piece.encode()

    def bytes_of_added(self, piece: str) -> bytes:
        """Added tokens are plain characters even in a byte-level vocabulary."""
        return piece.encode() if self._is_byte_level else self.bytes_of(piece)

    @staticmethod
    def _require(steps: Sequence[Mapping[str, Any]], supported: set[str]) -> None:
        types = sorted({step["type"] for step in steps})
        if not types or not supported.issuperset(types):
            raise _Unsupported(
                f"the decoder steps {types}; supported are ByteLevel, or Replace, Metaspace, ByteFallback, Fuse, Strip"
            )


def _flatten(component: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The steps of a decoder or pre-tokenizer, with sequences flattened."""
    if component["type"] != "Sequence":
        yield component
    for step in component.get("decoders") or component.get("pretokenizers") or ():
        yield from _flatten(step)


def _byte_level_alphabet() -> dict[str, int]:
    """Character -> byte in GPT-2's encoding: printable bytes as themselves, the others from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = (byte for byte in range(256) if byte not in printable)
    return {chr(b): b for b in printable} | {chr(0x100 + n): b for n, b in enumerate(hidden)}
