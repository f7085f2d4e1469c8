"""The sibling files of a tokenizer: special tokens, added tokens and the chat template."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_tp.file_kind import read_small, shown

CHAT_TEMPLATE = "chat_template.jinja"
SIBLINGS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    CHAT_TEMPLATE,
)
"""Optional files in a tokenizer's folder that belong to it."""

# Tokens with these names are control tokens even if the vocabulary declares them as plain text.
CONTROL_PIECE = re.compile(r"▁?(<[|｜].+[|｜]>|</?s>|<unk>|<pad>)", re.DOTALL)
# A file's pad_token and the like may also be ordinary text, such as "!". Those stay text.
_MARKUP = re.compile(r"[<\[].+[>\]]", re.DOTALL)


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token added to a vocabulary's own pieces, as described by the tokenizers library."""

    id: int
    content: str
    special: bool
    """Never produced from text."""
    lstrip: bool = False
    """Also consumes the white space before it."""
    rstrip: bool = False
    """Also consumes the white space after it."""
    single_word: bool = False
    """Matches only where no letter or digit is adjacent."""
    normalized: bool = False
    """Is matched in the normalized text."""

    @classmethod
    def of(cls, token_id: int, fields: Mapping[str, Any], *, special: bool) -> AddedToken:
        """From an entry of tokenizer.json or of `added_tokens_decoder`."""
        content = fields["content"]
        flags = {name: bool(fields.get(name, False)) for name in ("lstrip", "rstrip", "single_word")}
        is_special = special or bool(fields.get("special", False)) or CONTROL_PIECE.fullmatch(content) is not None
        normalized = bool(fields.get("normalized", not is_special))
        return cls(int(token_id), content, is_special, normalized=normalized, **flags)


class Siblings:
    """The contents of the optional files in a tokenizer's folder. ValueError names the damaged file."""

    def __init__(self, folder: Path) -> None:
        self._config_path = folder / "tokenizer_config.json"
        self.tokenizer_config = _read_json(self._config_path)
        self._special_tokens_map = _read_json(folder / "special_tokens_map.json")
        self._generation_path = folder / "generation_config.json"
        self._generation_config = read_generation_config(folder)
        self.template_variables = self._named_tokens()
        """bos_token, pad_token and so on, as named in templates."""
        self.special_pieces = self._special_pieces()
        """Tokens that are special because a file gives them a role."""
        self.stop_ids = frozenset(self._generation_ids("eos"))
        self.added_tokens = [*self._added_tokens(), *self._legacy_added_tokens(folder / "added_tokens.json")]
        self.chat_template, self.chat_template_file = self._template(folder / CHAT_TEMPLATE)

    @property
    def adds_bos(self) -> bool | None:
        """Whether a prompt begins with BOS. None: not specified."""
        return self.tokenizer_config.get("add_bos_token")

    def token_id(self, name: str, ids: Mapping[str, int], guess: int | None) -> int | None:
        """Id of "bos" or "eos": by name from a file, else by id from generation_config.json, else `guess`."""
        for config in (self.tokenizer_config, self._special_tokens_map):
            if (piece := _content(config.get(f"{name}_token"))) is not None and piece in ids:
                return ids[piece]
        if f"{name}_token" in self.tokenizer_config:  # null: explicitly none
            return None
        numbered = self._generation_ids(name)
        return numbered[0] if numbered else guess

    def _named_tokens(self) -> dict[str, str | list[str]]:
        """transformers' special_tokens_map, from both files; tokenizer_config.json takes precedence."""
        named: dict[str, str | list[str]] = {}
        for config in (self._special_tokens_map, self.tokenizer_config):
            for name, token in config.items():
                if name in ("additional_special_tokens", "extra_special_tokens") and isinstance(token, list):
                    named[name] = [piece for piece in map(_content, token) if piece is not None]
                elif name.endswith("_token") and (piece := _content(token)) is not None:
                    named[name] = piece
                elif name.endswith("_token") and token is None:
                    named.pop(name, None)
        return named

    def _special_pieces(self) -> set[str]:
        named = self.template_variables.values()
        pieces = {piece for token in named for piece in (token if isinstance(token, list) else [token])}
        return {piece for piece in pieces if _MARKUP.fullmatch(piece)}

    def _added_tokens(self) -> Iterator[AddedToken]:
        decoder = self.tokenizer_config.get("added_tokens_decoder") or {}
        try:
            for token_id, fields in decoder.items():
                yield AddedToken.of(int(token_id), fields, special=fields["content"] in self.special_pieces)
        except (AttributeError, KeyError, TypeError, ValueError):
            problem = "added_tokens_decoder must map ids to tokens with a content"
            raise ValueError(f"{self._config_path}: {problem}; download it again") from None

    def _legacy_added_tokens(self, path: Path) -> Iterator[AddedToken]:
        known = set(self.tokenizer_config.get("added_tokens_decoder") or {})
        for piece, token_id in _read_json(path).items():
            if not isinstance(token_id, int):
                raise ValueError(f"{path}: the id of {shown(repr(piece))} must be a number; download it again")
            if str(token_id) not in known:
                yield AddedToken.of(
                    token_id, {"content": piece, "normalized": False}, special=piece in self.special_pieces
                )

    def _template(self, file: Path) -> tuple[str | None, str | None]:
        """The default chat template, and the name of its file."""
        if file.is_file():
            try:
                return read_small(file).decode("utf-8"), file.name
            except UnicodeDecodeError:
                raise ValueError(f"{file} is not text in UTF-8; download it again") from None
        template = self.tokenizer_config.get("chat_template")
        if isinstance(template, list):  # several, by name
            named = [t for t in template if isinstance(t, dict) and t.get("name") == "default"]
            template = named[0].get("template") if named else None
        if not isinstance(template, (str, type(None))):
            raise ValueError(f"{self._config_path}: chat_template must be text, not {type(template).__name__}")
        return template, self._config_path.name if template else None

    def _generation_ids(self, name: str) -> Sequence[int]:
        value = self._generation_config.get(f"{name}_token_id")
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(token_id, int) for token_id in ids):
            problem = f"{name}_token_id={shown(json.dumps(value))} must be an id or a list of ids"
            raise ValueError(f"{self._generation_path}: {problem}; download it again")
        return ids


def parse_json(path: Path, data: bytes) -> dict[str, Any]:
    """The JSON object in a file. ValueError with the path for anything else."""
    try:
        parsed = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); download it again") from None
    if not isinstance(parsed, dict):
        raise ValueError(f"{path} is not a JSON object; download it again")
    return parsed


def read_generation_config(folder: Path) -> dict[str, Any]:
    """generation_config.json of a tokenizer's folder, {} if there is none. ValueError if it is damaged."""
    return _read_json(folder / "generation_config.json")


def _read_json(path: Path) -> dict[str, Any]:
    return parse_json(path, read_small(path)) if path.is_file() else {}


def _content(token: object) -> str | None:
    """The piece of a token given as a string or as a token description."""
    piece = token.get("content") if isinstance(token, dict) else token
    return piece if isinstance(piece, str) else None
