"""tokenizer.json, the file of the tokenizers library, and the files that stand beside it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llama_tp.text.vocabulary import CONTROL_PIECE, SPACE_MARK, Vocabulary, spaced_bytes

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_BOS_PIECES = ("<|begin_of_text|>", "<s>")
_EOS_PIECES = ("<|end_of_text|>", "</s>", "<|im_end|>", "<|endoftext|>")


class TokenizerJson(Vocabulary):
    """A tokenizer.json of the tokenizers library, with what its sibling files say of BOS, EOS and chat."""

    kind = "tokenizer.json"

    def __init__(self, path: Path, data: bytes) -> None:
        from tokenizers import Tokenizer as Library

        definition = _parse_json(path, data)
        if not isinstance(definition.get("model"), dict):
            raise ValueError(f"{path} is JSON, but no tokenizer.json: it has no 'model'; give the tokenizer's own file")
        try:
            added = {token["id"]: token for token in definition.get("added_tokens") or []}
            for token in added.values():
                token["special"] |= CONTROL_PIECE.fullmatch(token["content"]) is not None
            library = Library.from_str(json.dumps(definition))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{path} is not a readable tokenizer.json ({error}); download it again") from None
        library.no_truncation()
        library.no_padding()
        library.encode_special_tokens = True  # despite its name: special tokens in a text are encoded as plain text

        special_ids = {t["content"]: i for i, t in added.items() if t["special"]}
        to_bytes = _piece_decoder(path, definition)
        vocab = library.get_vocab()
        table = [b""] * (max(vocab.values()) + 1)
        for piece, i in vocab.items():
            if piece not in special_ids:
                table[i] = piece.encode() if i in added else to_bytes(piece)
        spaced = next((i for p, i in vocab.items() if p.startswith(SPACE_MARK) and table[i]), None)

        siblings = _Siblings(path.parent)
        super().__init__(
            table,
            special_ids,
            bos_id=siblings.token_id("bos", vocab, _BOS_PIECES),
            eos_id=siblings.token_id("eos", vocab, _EOS_PIECES),
            unk_id=vocab.get(definition["model"].get("unk_token") or ""),
            drops_leading_space=spaced is not None and not library.decode([spaced]).startswith(" "),
        )
        self._library = library
        self.stop_ids |= siblings.generation_stop_ids
        self.chat_template = siblings.chat_template
        adds_bos = siblings.tokenizer_config.get("add_bos_token")
        if adds_bos is None:
            adds_bos = library.encode("a", add_special_tokens=True).ids[:1] == [self.bos_id]
        self.adds_bos = adds_bos and self.bos_id is not None

    def _encode_plain(self, text: str) -> list[int]:
        return self._library.encode(text, add_special_tokens=False).ids


SIBLINGS = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "chat_template.jinja")
"""Files that a tokenizer.json may have beside it, and that belong to it."""


class _Siblings:
    """What the optional files beside a tokenizer.json say."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer_config = _read_json(folder / "tokenizer_config.json")
        self._special_tokens_map = _read_json(folder / "special_tokens_map.json")
        self._generation_config = _read_json(folder / "generation_config.json")
        self.generation_stop_ids = frozenset(self._generation_ids("eos"))
        template_file = folder / "chat_template.jinja"
        template = self.tokenizer_config.get("chat_template")
        if isinstance(template, list):  # several, by name
            named = [t for t in template if isinstance(t, dict) and t.get("name") == "default"]
            template = named[0].get("template") if named else None
        if not isinstance(template, (str, type(None))):
            raise ValueError(
                f"{folder / 'tokenizer_config.json'}: chat_template must be text, not {type(template).__name__}"
            )
        self.chat_template = template_file.read_text("utf-8") if template_file.is_file() else template

    def token_id(self, name: str, vocab: Mapping[str, int], guesses: Sequence[str]) -> int | None:
        """Id of "bos" or "eos": as a file names it, else as generation_config.json numbers it, else the first guess."""
        for config in (self.tokenizer_config, self._special_tokens_map):
            token = config.get(f"{name}_token")
            piece = token.get("content") if isinstance(token, dict) else token
            if isinstance(piece, str) and piece in vocab:
                return vocab[piece]
        if f"{name}_token" in self.tokenizer_config:  # null: said to have none
            return None
        if ids := self._generation_ids(name):
            return ids[0]
        return next((vocab[piece] for piece in guesses if piece in vocab), None)

    def _generation_ids(self, name: str) -> list[int]:
        ids = self._generation_config.get(f"{name}_token_id")
        return ids if isinstance(ids, list) else [] if ids is None else [ids]


def _read_json(path: Path) -> dict[str, Any]:
    return _parse_json(path, path.read_bytes()) if path.is_file() else {}


def _parse_json(path: Path, data: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); download it again") from None
    if not isinstance(parsed, dict):
        raise ValueError(f"{path} is not a JSON object; download it again")
    return parsed


def _piece_decoder(path: Path, definition: Mapping[str, Any]) -> Callable[[str], bytes]:
    """The function from a piece to its bytes, found from the decoder that tokenizer.json declares."""
    steps = list(_flatten(definition.get("decoder"))) + list(_flatten(definition.get("pre_tokenizer")))
    types = {step["type"] for step in steps}
    if "ByteLevel" in types:
        byte_of = _byte_level_alphabet()
        return lambda p: bytes(byte_of[c] for c in p) if all(c in byte_of for c in p) else p.encode()
    if {"ByteFallback", "Metaspace"} & types:
        falls_back = "ByteFallback" in types
        return lambda p: spaced_bytes(p, is_byte=falls_back and _BYTE_PIECE.fullmatch(p) is not None)
    raise ValueError(f"{path} has the decoder steps {sorted(types)}; supported are ByteLevel, Metaspace, ByteFallback")


def _flatten(component: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """The steps of a decoder or pre-tokenizer, sequences opened."""
    if component is not None:
        yield component
        for step in component.get("decoders") or component.get("pretokenizers") or ():
            yield from _flatten(step)


def _byte_level_alphabet() -> dict[str, int]:
    """Character -> byte as GPT-2 writes bytes: printable ones as themselves, the others from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = (byte for byte in range(256) if byte not in printable)
    return {chr(b): b for b in printable} | {chr(0x100 + n): b for n, b in enumerate(hidden)}
