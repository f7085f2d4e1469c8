"""Atomic creation of a folder or small file: written next to its destination, then moved by one rename."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

from llama_tp.checkpoint.store.manifest import MANIFEST

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


class StagedFolder:
    """The temporary sibling of a folder. `begin`, fill `path`, then `commit`; `discard` after any error.

    Whenever the process is killed, the destination is missing, or the complete old or new folder. A leftover temporary
    folder is removed by the next `begin`. Two processes cannot stage the same destination at the same time.
    """

    def __init__(self, destination: str | Path, *, overwrite: bool = False) -> None:
        self.destination = Path(destination).resolve()
        self.path = self.destination.with_name(f".{self.destination.name}.partial")
        self.overwrite = overwrite
        self._lock: int | None = None

    def begin(self) -> Path:
        """Create an empty `path`. ValueError if the destination may not be replaced or is being written."""
        if _aside(self.destination).exists() and not self.destination.exists():
            _aside(self.destination).rename(self.destination)
        self.check_destination()
        self.destination.parent.mkdir(parents=True, exist_ok=True)
        self._lock_destination()
        _remove(self.path)
        self.path.mkdir()
        return self.path

    def commit(self) -> None:
        """Move the finished folder to its destination, durably, and remove what was there."""
        _sync(self.path)
        if self.destination.exists():
            self.check_destination()
            _exchange(self.path, self.destination)
        else:
            self.path.rename(self.destination)
        _sync(self.destination.parent)
        self.discard()

    def discard(self) -> None:
        """Remove the temporary folder. Harmless if there is none."""
        if self._lock is not None:
            _remove(self.path)
            self._unlock()

    def _lock_destination(self) -> None:
        """Lock a file next to the folder; one inside would be lost by the rename."""
        path = self._lock_path()
        while True:
            handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(handle)
                raise ValueError(
                    f"another process is writing {self.destination}: wait for it or choose another folder"
                ) from None
            # The previous holder may have removed the file that we opened.
            if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
                self._lock = handle
                return
            os.close(handle)

    def _unlock(self) -> None:
        assert self._lock is not None
        self._lock_path().unlink(missing_ok=True)
        os.close(self._lock)
        self._lock = None

    def _lock_path(self) -> Path:
        return self.destination.with_name(f".{self.destination.name}.lock")

    def check_destination(self) -> None:
        """ValueError if the destination may not be replaced."""
        if not self.destination.exists():
            return
        if not self.destination.is_dir():
            raise ValueError(f"{self.destination} exists and is not a folder")
        if not any(self.destination.iterdir()):
            return
        if not self.overwrite:
            raise ValueError(f"{self.destination} exists: pass --overwrite to replace it, or choose another folder")
        if not (self.destination / MANIFEST).is_file():
            raise ValueError(
                f"{self.destination} exists and is not overwritten, because it has no {MANIFEST}; choose another folder"
            )


def check_space(staged: StagedFolder, needed: int) -> None:
    """ValueError if the disk of a staged folder does not have `needed` bytes free."""
    free = shutil.disk_usage(staged.path).free
    if free < needed:
        raise ValueError(
            f"{staged.destination.parent} has {free / 1e9:.1f} GB free, but the checkpoint needs {needed / 1e9:.1f} GB"
        )


def replace_file(path: Path, text: str) -> None:
    """Write a small file atomically: readers see the old one or the new one."""
    handle, name = tempfile.mkstemp(dir=path.resolve().parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def _exchange(new: Path, old: Path) -> None:
    """Swap two folders atomically. If the file system cannot, in three steps; `begin` repairs a kill between them."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(old), _RENAME_EXCHANGE) == 0:
        return
    code = ctypes.get_errno()
    if code not in (errno.EINVAL, errno.ENOSYS):
        raise OSError(code, os.strerror(code), str(old))
    aside = _aside(old)
    old.rename(aside)
    new.rename(old)
    aside.rename(new)


def _aside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def _sync(folder: Path) -> None:
    """Make the names in a folder durable; the files were synced when they were written."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
