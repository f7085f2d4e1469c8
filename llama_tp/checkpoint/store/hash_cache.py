"""Which files of a checkpoint were hashed and have not changed since, so that loads need not hash them again.

A file is unchanged if its size, inode, mtime and ctime are. A program can set mtime but not ctime, which the kernel
sets whenever content or attributes change. Damage that the file system does not notice, such as bit rot, is not
detected.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import astuple, dataclass
from pathlib import Path

from llama_tp.checkpoint.store.manifest import HASH_CACHE, manifest_digest
from llama_tp.checkpoint.store.staging import replace_file
from llama_tp.user_cache import cache_folder

_FORMAT_VERSION = 1
_MAX_BYTES = 4 << 20
_SETTLED_NS = 2_000_000_000
"""Timestamps are coarse, so a second change within one tick would go unnoticed. A file is trusted only if its last
change is at least this old when it is hashed."""


@dataclass(frozen=True, slots=True)
class FileState:
    """Identifies the content of a file that nobody changes."""

    size: int
    inode: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, path: Path) -> FileState:
        stat = path.stat()
        return cls(stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns)

    def is_settled(self) -> bool:
        return time.time_ns() - max(self.mtime_ns, self.ctime_ns) > _SETTLED_NS


def recall(folder: Path) -> set[tuple[str, FileState]]:
    """The hashed files and their states at that time. Empty if the manifest has changed or nothing is recorded."""
    digest = manifest_digest(folder)
    found: set[tuple[str, FileState]] = set()
    for path in _cache_files(folder):
        # A cache that cannot be read is ignored, for whatever reason.
        with suppress(OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            if path.stat().st_size > _MAX_BYTES:
                continue
            content = json.loads(path.read_bytes())
            if content["format_version"] == _FORMAT_VERSION and content["manifest_sha256"] == digest:
                found |= {(name, FileState(*map(int, state))) for name, state in content["files"].items()}
    return found


def remember(folder: Path, states: Mapping[str, FileState]) -> Path | None:
    """Record that these files matched the manifest. The file written; None if no location is writable.

    It is in the checkpoint's folder or, if that is not writable, in the user's cache.
    """
    content = {
        "format_version": _FORMAT_VERSION,
        "manifest_sha256": manifest_digest(folder),
        "files": {name: astuple(state) for name, state in sorted(states.items())},
    }
    for path in _cache_files(folder):
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, json.dumps(content, indent=1) + "\n")
            return path
    return None


def _cache_files(folder: Path) -> list[Path]:
    files = [folder / HASH_CACHE]
    with suppress(ValueError):  # no home folder
        key = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()
        files.append(cache_folder() / "verified" / f"{key}.json")
    return files
