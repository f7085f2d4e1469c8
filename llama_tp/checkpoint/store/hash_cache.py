"""Which files of a checkpoint were hashed, and are the same files still: those need not be hashed at every load.

A file counts as the same while its size, its inode and both its times of change are. A program can set mtime but not
ctime, which the kernel sets whenever content or attributes change. What no file system notices, such as a disk that
forgets, is not noticed here either.
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

from llama_tp.checkpoint.store.manifest import HASH_CACHE, MANIFEST
from llama_tp.checkpoint.store.staging import replace_file
from llama_tp.checkpoint.user_cache import cache_folder

_FORMAT_VERSION = 1
_MAX_BYTES = 4 << 20
_SETTLED_NS = 2_000_000_000
"""A file system's clock has ticks, within which a second change would go unseen. So a file is trusted only if its last
change is at least this old when it is hashed."""


@dataclass(frozen=True, slots=True)
class FileState:
    """What identifies the content of a file as long as nobody changes it."""

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
    """The files that were hashed, as they were then. Empty if the manifest is another now, or nothing is remembered."""
    digest = _manifest_digest(folder)
    found: set[tuple[str, FileState]] = set()
    for place in _places(folder):
        # What cannot be read as it was written is forgotten, whatever is wrong with it.
        with suppress(OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            if place.stat().st_size > _MAX_BYTES:
                continue
            content = json.loads(place.read_bytes())
            if content["format_version"] == _FORMAT_VERSION and content["manifest_sha256"] == digest:
                found |= {(name, FileState(*map(int, state))) for name, state in content["files"].items()}
    return found


def remember(folder: Path, states: Mapping[str, FileState]) -> Path | None:
    """Note that these files had the hashes of the manifest. The file that says so; None if it cannot be kept anywhere.

    It lies in the checkpoint's folder or, if that cannot be written to, in the user's cache.
    """
    content = {
        "format_version": _FORMAT_VERSION,
        "manifest_sha256": _manifest_digest(folder),
        "files": {name: astuple(state) for name, state in sorted(states.items())},
    }
    for place in _places(folder):
        with suppress(OSError):
            place.parent.mkdir(parents=True, exist_ok=True)
            replace_file(place, json.dumps(content, indent=1) + "\n")
            return place
    return None


def _places(folder: Path) -> list[Path]:
    places = [folder / HASH_CACHE]
    with suppress(ValueError):  # there is no home folder
        key = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()
        places.append(cache_folder() / "verified" / f"{key}.json")
    return places


def _manifest_digest(folder: Path) -> str:
    return hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
