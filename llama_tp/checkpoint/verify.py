"""Is a checkpoint folder what its manifest says? Quickly before each load, to the last bit on request."""

from __future__ import annotations

from pathlib import Path

from llama_tp.checkpoint.manifest import MANIFEST, FileEntry, Manifest, hash_file, load_manifest
from llama_tp.checkpoint.progress import Advance, byte_progress, no_progress
from llama_tp.file_kind import read_head, why_no_content

WEIGHT_SUFFIXES = (".distcp", ".pth")
SMALL = 16 << 20
"""Files up to this many bytes are hashed by the quick check too: metadata and settings steer what is read."""


def verify(folder: str | Path, full: bool = True) -> Manifest:
    """Compare a folder with its manifest, and return that. ValueError names the first bad file.

    The quick check (`full=False`) takes milliseconds: every file has its recorded size and is no link, no weight file
    is there that the manifest does not know, and small files have their recorded hash. The full one hashes all files.
    """
    folder = Path(folder)
    manifest = load_manifest(folder)
    for name, entry in manifest.files.items():
        _check_size(folder / name, entry)
    for path in folder.iterdir():
        if (
            path.name not in manifest.files
            and path.name != MANIFEST
            and path.name.endswith((*WEIGHT_SUFFIXES, ".metadata"))
        ):
            raise ValueError(f"{path} is not in {MANIFEST}: it does not belong to this checkpoint")
    if not full:
        for name, entry in manifest.files.items():
            if entry.size <= SMALL:
                _check_hash(folder / name, entry, no_progress)
        return manifest
    with byte_progress(f"Verifying {folder.name}", sum(entry.size for entry in manifest.files.values())) as advance:
        for name, entry in manifest.files.items():
            _check_hash(folder / name, entry, advance)
    return manifest


def _check_size(path: Path, entry: FileEntry) -> None:
    if path.is_symlink() or not path.is_file():
        raise ValueError(f"{path} is missing (or is no plain file), {MANIFEST} lists it with {entry.size} bytes")
    if (size := path.stat().st_size) != entry.size:
        if problem := why_no_content(read_head(path)):
            raise ValueError(f"{path} {problem}")
        raise ValueError(f"{path} has {size} bytes, {MANIFEST} says {entry.size}: it is truncated or was changed")


def _check_hash(path: Path, entry: FileEntry, advance: Advance) -> None:
    if (sha256 := hash_file(path, advance)) != entry.sha256:
        raise ValueError(f"{path} is corrupt: its sha256 is {sha256[:16]}..., {MANIFEST} says {entry.sha256[:16]}...")
