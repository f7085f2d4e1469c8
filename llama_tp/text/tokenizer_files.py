"""Find a tokenizer, and copy it with the files that belong to it."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from llama_tp.file_kind import check_link
from llama_tp.text.siblings import SIBLINGS

TOKENIZER_NAMES = ("tokenizer.json", "tokenizer.model")
TOKENIZER_FILES = (*TOKENIZER_NAMES, *SIBLINGS)
"""The names under which `copy_tokenizer` keeps a tokenizer and its siblings."""


_MISTRALS = re.compile(r"tokenizer\.model\.v(\d+)(m\d+)?")
"""Mistral AI's sentencepiece models, by their version."""
_TEKKEN = "tekken.json"
"""Mistral AI's other vocabulary. `load_tokenizer` refuses it with the remedy."""


def find_tokenizer(path: str | Path, *, preferred: str = "tokenizer.json") -> Path:
    """The tokenizer file at a path. In a folder: the preferred one if it exists, else any other.

    FileNotFoundError if there is none.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no tokenizer at {path}; pass tokenizer.model, tokenizer.json, or a folder with one")
    if not path.is_dir():
        return path
    for name in sorted({preferred, *TOKENIZER_NAMES}, key=lambda name: (name != preferred, name)):
        if (path / name).is_file():
            return path / name
    versions = {match: file for file in path.iterdir() if (match := _MISTRALS.fullmatch(file.name)) and file.is_file()}
    if versions:
        return versions[max(versions, key=lambda match: (int(match[1]), match[2] or ""))]
    if (path / _TEKKEN).is_file():
        return path / _TEKKEN
    raise FileNotFoundError(f"the folder {path} has neither tokenizer.json nor tokenizer.model; copy one there")


def check_links(path: str | Path) -> None:
    """ValueError if a file that `copy_tokenizer` would copy is a link out of the tokenizer's folder.

    A published chat template could be a link to a private key. The file that `path` itself names may be anywhere.
    """
    file = find_tokenizer(path)
    names = SIBLINGS if file == Path(path) else (file.name, *SIBLINGS)
    for name in names:
        if (found := file.with_name(name)).is_file():
            check_link(file.parent, found)


def copy_tokenizer(path: str | Path, folder: Path, *, name: str | None = None) -> None:
    """Copy a tokenizer and its sibling files into a folder. The default name is one that `find_tokenizer` finds."""
    file = find_tokenizer(path)
    shutil.copyfile(file, folder / (name or TOKENIZER_NAMES[file.suffix != ".json"]))
    for sibling in SIBLINGS:
        if (source := file.with_name(sibling)).is_file():
            shutil.copyfile(source, folder / sibling)
