"""Which of a repository's files are one form of its model, by their names. A repository often has several."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from posixpath import dirname
from urllib.parse import quote

from llama_tp.text.siblings import SIBLINGS
from llama_tp.text.tokenizer_files import TOKENIZER_NAMES

META, HF, MISTRAL = "meta", "hf", "mistral"
"""Forms, as on the command line."""
CONFIG, PARAMS = "config.json", "params.json"
_TERMS = ("LICENSE*", "USE_POLICY*")
_ORIGINALS = ("consolidated.*.pth", PARAMS, "tokenizer.model", "*checklist.chk", *_TERMS)
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_CONSOLIDATED, _CONSOLIDATED_INDEX = "consolidated.safetensors", "consolidated.safetensors.index.json"
_MISTRAL_TOKENIZERS = (*TOKENIZER_NAMES, "tokenizer.model.v*")
_BESIDE_SAFETENSORS = (CONFIG, *TOKENIZER_NAMES, *SIBLINGS, *_TERMS)
_GGUF_PART = re.compile(r"(.+)-\d{5}-of-(\d{5})\.gguf")


@dataclass(frozen=True, slots=True)
class Selection:
    """What to download of a repository."""

    form: str
    """META, HF, MISTRAL or a `gguf_form`; names the record of the download."""
    names: tuple[str, ...]
    """Files, by their paths in the repository."""
    target: str
    """The folder or file among them that can be converted; empty for the repository itself."""


def select_originals(names: Iterable[str]) -> Selection | None:
    """Meta's originals: at the top level of the repository as of Llama 2, or in original/ as of Llama 3."""
    wanted = _matching(names, _ORIGINALS, folders=("", "original"))
    shards = [name for name in wanted if name.endswith(".pth")]
    return Selection(META, wanted, dirname(shards[0])) if shards else None


def select_safetensors(names: Iterable[str]) -> Selection | None:
    """A Hugging Face model: its weights once, config.json, and the tokenizer's files."""
    names = list(names)
    weights = (_SINGLE,) if _SINGLE in names else (_INDEX, "model-*.safetensors")
    has_weights = any(name in names for name in (_SINGLE, _INDEX))
    if CONFIG not in names or not has_weights:
        return None
    return Selection(HF, _matching(names, (*_BESIDE_SAFETENSORS, *weights), folders=("",)), "")


def select_consolidated(names: Iterable[str]) -> Selection | None:
    """Mistral AI's own form: consolidated.safetensors or its parts, params.json, and the tokenizer's files."""
    names = list(names)
    weights = (_CONSOLIDATED,) if _CONSOLIDATED in names else (_CONSOLIDATED_INDEX, "consolidated-*.safetensors")
    if PARAMS not in names or weights[0] not in names:
        return None
    beside = (PARAMS, *_MISTRAL_TOKENIZERS, *SIBLINGS, *_TERMS)
    return Selection(MISTRAL, _matching(names, (*beside, *weights), folders=("",)), "")


def has_tokenizer(selection: Selection) -> bool:
    """Whether a selection of Mistral AI's form has a tokenizer that can be read; tekken.json cannot."""
    return bool(_matching(selection.names, _MISTRAL_TOKENIZERS, folders=("",)))


def select_gguf(names: Iterable[str], file: str) -> Selection | None:
    """One GGUF file, or all parts of a split one, of which `file` is any."""
    parts = [file]
    if match := _GGUF_PART.fullmatch(file):
        parts = [f"{match[1]}-{part:05d}-of-{match[2]}.gguf" for part in range(1, int(match[2]) + 1)]
    return Selection(gguf_form(file), tuple(parts), parts[0]) if {file, *parts} <= set(names) else None


def gguf_form(file: str) -> str:
    """The form of a GGUF file, the same for all parts of a split one."""
    match = _GGUF_PART.fullmatch(file)
    return quote(f"{match[1]}-of-{match[2]}.gguf" if match else file, safe="")


def gguf_files(names: Iterable[str]) -> list[str]:
    return sorted(name for name in names if name.endswith(".gguf"))


def _matching(names: Iterable[str], patterns: Iterable[str], folders: Iterable[str]) -> tuple[str, ...]:
    """The files directly in these folders whose names match one of the patterns."""
    patterns, folders = tuple(patterns), tuple(folders)
    return tuple(
        name
        for name in sorted(names)
        if dirname(name) in folders and any(fnmatchcase(name.rpartition("/")[2], pattern) for pattern in patterns)
    )
