"""manifest.json: size and sha256 of every file of a checkpoint folder. Written last: no manifest, no checkpoint."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llama_tp.checkpoint.progress import Advance, no_progress
from llama_tp.file_kind import describe_model_folder

MANIFEST = "manifest.json"
HASH_CACHE = ".verified.json"
"""Not in the manifest: it records which files have been hashed since, see `hash_cache`."""
FORMAT_VERSION = 2
_MAX_BYTES = 64 << 20
_BLOCK = 4 << 20

Look = Callable[[int, memoryview], None]
"""Called with the offset of a block in its file, and its bytes, which are valid until it returns."""


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A file as it was written."""

    size: int
    """Bytes."""
    sha256: str
    """Lowercase hex."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """The contents of manifest.json."""

    files: Mapping[str, FileEntry]
    """By file name. A checkpoint folder has no subfolders."""
    about: Mapping[str, Any]
    """Where the checkpoint came from: for humans, and to distinguish checkpoints."""


def load_manifest(folder: str | Path) -> Manifest:
    """Read manifest.json. ValueError if it is missing or invalid."""
    path = Path(folder) / MANIFEST
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError("it is too large")
        content = json.loads(path.read_bytes())
        if content["format_version"] != FORMAT_VERSION:
            raise ValueError(
                f"format_version={content['format_version']!r}, but this program reads {FORMAT_VERSION}; convert the "
                "originals again"
            )
        files = {name: FileEntry(int(entry["size"]), str(entry["sha256"])) for name, entry in content["files"].items()}
        if odd := [name for name in files if name != os.path.basename(name) or name in ("", ".", "..")]:
            raise ValueError(f"{odd[0]!r} is not a file name")
        return Manifest(files, dict(content["about"]))
    except FileNotFoundError:
        found = describe_model_folder(Path(folder)) or "is not a complete converted checkpoint; convert it again"
        raise ValueError(f"{path} does not exist: {folder} {found}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path} is not a manifest: {type(error).__name__}: {error}") from None


def write_manifest(
    folder: str | Path, *, known: Mapping[str, FileEntry] | None = None, about: Mapping[str, Any] | None = None
) -> Manifest:
    """Hash every file of the folder except those in `known`, and write manifest.json durably."""
    folder = Path(folder)
    files = dict(known or {})
    for path in sorted(folder.iterdir()):
        if path.name not in files and path.name not in (MANIFEST, HASH_CACHE):
            files[path.name] = FileEntry(path.stat().st_size, hash_file(path))
    manifest = Manifest(dict(sorted(files.items())), dict(about or {}))
    with (folder / MANIFEST).open("w") as file:
        file.write(json.dumps({"format_version": FORMAT_VERSION, **asdict(manifest)}, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    return manifest


def manifest_digest(folder: str | Path) -> str:
    """The sha256 of manifest.json, which stands for all files."""
    return hashlib.sha256((Path(folder) / MANIFEST).read_bytes()).hexdigest()


def hash_file(path: str | Path, advance: Advance = no_progress, look: Look | None = None) -> str:
    """The sha256 of a file. `look` gets its blocks, in order."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(min(_BLOCK, Path(path).stat().st_size + 1)))
    offset = 0
    with Path(path).open("rb") as file:
        while size := file.readinto(buffer):
            digest.update(buffer[:size])
            if look is not None:
                look(offset, buffer[:size])
            offset += size
            advance(size)
    return digest.hexdigest()
