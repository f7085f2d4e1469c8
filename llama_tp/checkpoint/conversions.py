"""Checkpoints that were converted to be served, each once: a cache that the user can list and empty.

An entry is a folder with a converted checkpoint, next to a small file that says what it was made from. Its name depends
on the source's files and on the options, so a changed source is a new entry, and an entry in use never changes.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from glob import escape
from itertools import islice
from pathlib import Path

from llama_tp.checkpoint.store.staging import replace_file
from llama_tp.user_cache import cache_folder

_FOLDER = "converted"
_FORMAT_VERSION = 1
"""Of entries: raise it when `convert` writes something that is to replace what is cached."""
_MAX_FILES = 5_000
_PART = re.compile(r"(.*)-\d{5}-of-(\d{5}\.gguf)")
"""A split GGUF file."""


@dataclass(frozen=True, slots=True)
class ConversionOptions:
    """Options of `convert` that change its result."""

    dtype: str | None = None
    quantize: str | None = None
    tokenizer: str | None = None


@dataclass(frozen=True, slots=True)
class Conversion:
    """An entry of the cache."""

    folder: Path
    source: str
    """Path of what was converted."""
    options: ConversionOptions
    fingerprint: str
    """Of the source's files when they were converted."""

    @property
    def num_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())

    @property
    def is_current(self) -> bool:
        """Whether the source still exists as it was."""
        try:
            return fingerprint(self.source, self.options) == self.fingerprint
        except (OSError, ValueError):
            return False


def converted(source: str | Path, options: ConversionOptions) -> Path:
    """The folder of the source's conversion, which is made if there is none. Waits while another process makes it.

    ValueError or OSError, in one line, if the source cannot be converted or the cache cannot be written.
    """
    source = Path(source).resolve()
    key = fingerprint(source, options)
    name = re.sub(r"[^\w.-]", "_", source.stem if source.is_file() else source.name) or "model"
    folder = _cache() / f"{name}-{key[:16]}"
    if _record(folder).is_file() and folder.is_dir():
        return folder
    with _locked(folder):
        if not (_record(folder).is_file() and folder.is_dir()):
            _convert(source, folder, options)
            about = {"source": str(source), "options": asdict(options), "fingerprint": key}
            replace_file(_record(folder), json.dumps(about) + "\n")
    return folder


def conversions() -> list[Conversion]:
    """The complete entries of the cache, by name."""
    found = []
    for record in sorted(_cache(create=False).glob("*.json")):
        with suppress(OSError, ValueError, KeyError, TypeError):
            about = json.loads(record.read_bytes())
            options = ConversionOptions(**about["options"])
            found.append(Conversion(record.with_suffix(""), str(about["source"]), options, str(about["fingerprint"])))
    return found


def remove(conversion: Conversion) -> None:
    """Delete an entry. A server that uses it goes on, but could not load it again."""
    with _locked(conversion.folder):
        _record(conversion.folder).unlink(missing_ok=True)
        shutil.rmtree(conversion.folder, ignore_errors=True)


def fingerprint(source: str | Path, options: ConversionOptions) -> str:
    """A hash of the names, sizes and times of the source's files, and of the options."""
    source = Path(source)
    state: list[object] = [_FORMAT_VERSION, str(source), asdict(options)]
    tokenizer = [] if options.tokenizer is None else [Path(options.tokenizer)]
    for root in (source, *tokenizer):
        for path in _files(root):
            info = path.stat()
            state.append((str(path.relative_to(root.parent)), info.st_size, info.st_mtime_ns))
    return hashlib.sha256(json.dumps(state).encode("utf-8", "surrogateescape")).hexdigest()


def _files(source: Path) -> list[Path]:
    """A source's files. ValueError if they are too many for a checkpoint."""
    if not source.is_dir():
        parts = _PART.fullmatch(source.name)
        return sorted(source.parent.glob(f"{escape(parts[1])}-*-of-{escape(parts[2])}")) if parts else [source]
    visible = (path for path in source.rglob("*") if not any(n[0] == "." for n in path.relative_to(source).parts))
    files = list(islice((path for path in visible if path.is_file()), _MAX_FILES + 1))
    if len(files) > _MAX_FILES:
        raise ValueError(f"{source} has more than {_MAX_FILES} files: it is not the folder of a checkpoint")
    return sorted(files)


def _convert(source: Path, folder: Path, options: ConversionOptions) -> None:
    from llama_tp.checkpoint.convert import MODEL_ARGS, convert  # imports torch

    _say(f"Converting {source}, once; the result is kept in {folder}")
    if older := [one for one in conversions() if one.source == str(source) and not one.is_current]:
        size = sum(one.num_bytes for one in older) / 1e9
        _say(f"Earlier conversions of it are out of date; `llama-tp cache --remove=stale` frees {size:.1f} GB")
    with _stdout_to_stderr():
        convert(
            str(source),
            options.tokenizer,
            save_checkpoint_dir=str(folder),
            model_args_path=str(folder / MODEL_ARGS),
            dtype=options.dtype,
            quantize=options.quantize,
            overwrite=folder.exists(),
        )


@contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    before, sys.stdout = sys.stdout, sys.stderr
    try:
        yield
    finally:
        sys.stdout = before


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Only one process at a time makes or removes an entry. The lock file stays: it is empty."""
    path = folder.with_name(f"{folder.name}.lock")
    handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say(f"Waiting for another llama-tp that is converting to {folder}")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _record(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.json")


def _cache(*, create: bool = True) -> Path:
    folder = (cache_folder() / _FOLDER).absolute()
    if create:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = error.strerror
        else:
            if os.access(folder, os.W_OK):
                return folder
            reason = "it is not writable"
        raise ValueError(f"cannot keep the converted checkpoint in {folder} ({reason}); set LLAMA_TP_CACHE to a folder")
    return folder


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
