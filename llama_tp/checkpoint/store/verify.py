"""Is a checkpoint folder what its manifest says? Quickly before each load, to the last bit on request."""

from __future__ import annotations

from pathlib import Path

from llama_tp.checkpoint.progress import Advance, byte_progress, no_progress
from llama_tp.checkpoint.store.hash_cache import FileState, remember
from llama_tp.checkpoint.store.manifest import MANIFEST, FileEntry, Manifest, hash_file, load_manifest
from llama_tp.file_kind import read_head, why_no_content

WEIGHT_SUFFIXES = (".distcp", ".pth")
SMALL = 16 << 20
"""Files up to this many bytes are hashed by the quick check too: metadata and settings steer what is read."""


def verify(folder: str | Path, full: bool = True) -> Manifest:
    """Compare a folder with its manifest, and return that. ValueError names the first bad file.

    The quick check (`full=False`) takes milliseconds: every file has its recorded size and is no link, no weight file
    is there that the manifest does not know, and small files have their recorded hash. The full one hashes all files,
    and the next load need not do it again.
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
                check_hash(folder / name, entry)
        return manifest
    with byte_progress(f"Verifying {folder.name}", sum(entry.size for entry in manifest.files.values())) as advance:
        states = {name: check_hash(folder / name, entry, advance) for name, entry in manifest.files.items()}
    remember(folder, {name: state for name, state in states.items() if state is not None})
    return manifest


def check_hash(path: Path, entry: FileEntry, advance: Advance = no_progress) -> FileState | None:
    """The state that the file was hashed in; None if that may not be relied on later. ValueError for another hash."""
    before = FileState.of(path)
    is_settled = before.is_settled()
    if (sha256 := hash_file(path, advance)) != entry.sha256:
        raise ValueError(f"{path} is corrupt: its sha256 is {sha256[:16]}..., {MANIFEST} says {entry.sha256[:16]}...")
    return before if is_settled and FileState.of(path) == before else None


def _check_size(path: Path, entry: FileEntry) -> None:
    if path.is_symlink() or not path.is_file():
        raise ValueError(f"{path} is missing (or is no plain file), {MANIFEST} lists it with {entry.size} bytes")
    if (size := path.stat().st_size) != entry.size:
        if problem := why_no_content(read_head(path)):
            raise ValueError(f"{path} {problem}")
        raise ValueError(f"{path} has {size} bytes, {MANIFEST} says {entry.size}: it is truncated or was changed")
