"""Compare a checkpoint folder with its manifest: a quick check before each load, all bytes on request."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from llama_tp.checkpoint.progress import Advance, byte_progress, no_progress
from llama_tp.checkpoint.store.finite_values import FiniteValues
from llama_tp.checkpoint.store.hash_cache import FileState, remember
from llama_tp.checkpoint.store.manifest import MANIFEST, FileEntry, Look, Manifest, hash_file, load_manifest
from llama_tp.checkpoint.store.table import TABLE, load_table
from llama_tp.file_kind import read_head, why_no_content
from llama_tp.threads import num_workers

WEIGHT_SUFFIXES = (".distcp", ".pth")
SMALL = 16 << 20
"""Even the quick check hashes files up to this many bytes: metadata and settings decide what is read."""


def verify(folder: str | Path, full: bool = True) -> Manifest:
    """Compare a folder with its manifest, and return the manifest. ValueError names the first bad file.

    The quick check (`full=False`) takes milliseconds: every file has its recorded size and is not a link, there are no
    weight files missing from the manifest, and small files have their recorded hash. The full check reads all files
    once: they have their recorded hash, so that the next load need not compute it, and all numbers in the tensors of a
    converted checkpoint are finite.
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
    remember(folder, {name: state for name, state in _verify_files(folder, manifest).items() if state is not None})
    return manifest


def check_hash(
    path: Path, entry: FileEntry, advance: Advance = no_progress, look: Look | None = None
) -> FileState | None:
    """The state of the file when hashed, or None if it may have changed meanwhile. ValueError if the hash differs."""
    before = FileState.of(path)
    is_settled = before.is_settled()
    if (sha256 := hash_file(path, advance, look)) != entry.sha256:
        raise ValueError(
            f"{path} is corrupt: its sha256 is {sha256[:16]}..., but {MANIFEST} says {entry.sha256[:16]}..."
        )
    return before if is_settled and FileState.of(path) == before else None


def _verify_files(folder: Path, manifest: Manifest) -> dict[str, FileState | None]:
    """Read all files once, in several threads. ValueError names the first bad one in the order of the manifest."""
    table = load_table(folder, manifest) if TABLE in manifest.files else {}

    def verify_file(name: str) -> FileState | None:
        values = FiniteValues(table, name)
        state = check_hash(folder / name, manifest.files[name], advance, values.look)
        if values.fault is not None:
            raise ValueError(f"{folder}: {values.fault}, and was so when it was written; convert the originals again")
        return state

    torch_threads = torch.get_num_threads()
    total = sum(entry.size for entry in manifest.files.values())
    try:
        with byte_progress(f"Verifying {folder.name}", total) as advance, _threads() as pool:
            futures = {name: pool.submit(verify_file, name) for name in manifest.files}
            try:
                return {name: future.result() for name, future in futures.items()}
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    finally:
        torch.set_num_threads(torch_threads)  # the last setting is the default of new threads


def _threads() -> ThreadPoolExecutor:
    """Each of them computes alone: the other cores have other threads."""
    workers = num_workers()
    return ThreadPoolExecutor(workers, "verify", initializer=torch.set_num_threads, initargs=(1,))


def _check_size(path: Path, entry: FileEntry) -> None:
    if path.is_symlink() or not path.is_file():
        raise ValueError(f"{path} is missing or not a regular file, but {MANIFEST} lists it with {entry.size} bytes")
    if (size := path.stat().st_size) != entry.size:
        if problem := why_no_content(read_head(path)):
            raise ValueError(f"{path} {problem}")
        raise ValueError(f"{path} has {size} bytes, but {MANIFEST} says {entry.size}: it is truncated or was changed")
