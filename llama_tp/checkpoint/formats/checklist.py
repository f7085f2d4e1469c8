"""checklist.chk: the md5 of each original file, which Meta ships with the weights (the output of md5sum).

A thread hashes the shards while they are converted. Both read all shards in parallel, from their beginnings, so what
one has read the other finds in the page cache: the disk is read once, not twice.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

from llama_tp.checkpoint.progress import Advance, byte_progress, no_progress
from llama_tp.file_kind import check_link, read_small, why_no_content

_PATTERN = "*checklist.chk"
"""Llama 2's tokenizer.model has its own list, tokenizer_checklist.chk."""
_LINE = re.compile(r"\\?([0-9a-fA-F]{32}) [ *]?(.+)")
_BLOCK = 4 << 20


def expected_md5s(folder: Path) -> dict[str, frozenset[str]]:
    """The md5s in a folder's checklists, by file name; {} if there is none. ValueError if one is damaged.

    A list of several models names each file in its model's folder, so a name can have several hashes.
    """
    found: dict[str, frozenset[str]] = {}
    for checklist in sorted(folder.glob(_PATTERN)):
        check_link(folder, checklist)
        for name, md5 in _read(checklist):
            found[name] = found.get(name, frozenset()) | {md5}
    return found


def check_original(path: Path) -> None:
    """Compare a small file with the checklist in its folder, if there is one. ValueError if they differ."""
    if not path.is_file():
        return
    if expected := expected_md5s(path.parent).get(path.name):
        _compare(path, hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest(), expected)


class BackgroundCheck:
    """Hashes shards in a thread, one block of each in turn, while the body of the context runs."""

    def __init__(self, expected: Mapping[Path, frozenset[str]]) -> None:
        self._expected = expected
        self._remaining = sum(path.stat().st_size for path in expected)
        self._advance: Advance = no_progress
        self._is_cancelled = threading.Event()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="checklist", daemon=True)

    def __enter__(self) -> BackgroundCheck:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._is_cancelled.set()
        self._thread.join()

    def finish(self, *, show_progress: bool = True) -> None:
        """Wait for the thread. ValueError names a shard that does not match the checklist."""
        with byte_progress("Comparing with checklist.chk", self._remaining, enabled=show_progress) as advance:
            self._advance = advance
            self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            self._hash_all()
        except Exception as error:  # raised by finish(), in the thread that can report it
            self._error = error

    def _hash_all(self) -> None:
        digests = {path: hashlib.md5(usedforsecurity=False) for path in self._expected}
        files: dict[Path, BinaryIO] = {}
        try:
            files = {path: path.open("rb") for path in self._expected}
            reading = list(files)
            while reading and not self._is_cancelled.is_set():
                for path in list(reading):
                    if block := files[path].read(_BLOCK):
                        digests[path].update(block)
                        self._remaining -= len(block)
                        self._advance(len(block))
                    else:
                        reading.remove(path)
                        _compare(path, digests[path].hexdigest(), self._expected[path])
        finally:
            for file in files.values():
                file.close()


def write_checklist(folder: Path, known: Mapping[str, str]) -> None:
    """checklist.chk of every file of a folder, as md5sum would write it; `known`: the md5 sums of some, by name."""
    lines = []
    for path in sorted(folder.iterdir()):
        md5 = known.get(path.name) or hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
        lines.append(f"{md5}  {path.name}\n")
    (folder / "checklist.chk").write_text("".join(lines))


def listed_shards(names: Iterable[str]) -> list[str]:
    """The names on a checklist that are shards."""
    return sorted(name for name in names if re.fullmatch(r"consolidated\.\d\d\.pth", name))


def _read(checklist: Path) -> list[tuple[str, str]]:
    """(file name, lower-case md5) of each line."""
    data = read_small(checklist)
    if problem := why_no_content(data):
        raise ValueError(f"{checklist} {problem}")
    entries = []
    for number, line in enumerate(data.decode("utf-8-sig", "replace").splitlines(), 1):
        if not line.strip():
            continue
        if (match := _LINE.fullmatch(line.rstrip())) is None:
            raise ValueError(
                f"{checklist}, line {number}: {line[:64]!r} is not an md5 and a file name; download it again"
            )
        entries.append((match[2].replace("\\", "/").rsplit("/", 1)[-1], match[1].lower()))
    return entries


def _compare(path: Path, md5: str, expected: frozenset[str]) -> None:
    if md5 not in expected:
        wanted = " or ".join(sorted(expected))
        raise ValueError(
            f"{path} is damaged or is another file: its md5 is {md5}, the checklist says {wanted}; download it again"
        )
