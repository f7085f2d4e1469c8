"""Compiled libraries, kept in the user's cache.

An entry is a folder with a library and a record of it. It appears and disappears by one rename, so it is complete
whatever is killed; its record has the library's sha256, so damage is noticed. Libraries are code, so entries that
another user could have written are not used.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from llama_tp import __version__
from llama_tp.user_cache import cache_folder

LIBRARY = "kernels.so"
_RECORD = "about.json"
_FOLDER = "kernels"
_LOCK = ".lock-"
_STAGED = ".staged-"
_ENTRIES = "[0-9a-f]*-*"
_MAX_ENTRIES = 8
_POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class Entry:
    """A compiled library of the cache."""

    folder: Path
    compiler: str
    """The command that made it."""
    version: str
    """Of llama_tp, when it was compiled."""

    @property
    def num_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.folder.glob("*"))

    @property
    def is_current(self) -> bool:
        """Whether this version of llama_tp could use it."""
        return self.version == __version__


def user_folder() -> Path:
    """Where libraries are kept, if that is possible. ValueError if the user has no home folder."""
    return (cache_folder() / _FOLDER).absolute()


def why_unsafe(folder: Path) -> str | None:
    """Why libraries in a folder cannot be trusted: another user could have written them. None if they can."""
    try:
        for path in (folder.parent, folder):
            if not _is_ours(path):
                return f"{path} belongs to another user"
        if _is_writable_by_others(folder):
            return f"other users may write to {folder}: chmod go-w it"
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"{folder}: {error.strerror}"
    return None


def why_unwritable(folder: Path) -> str | None:
    """Why no library can be added to a folder, which is created. None if one can."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o755, exist_ok=True)
    except OSError as error:
        return f"{folder}: {error.strerror}"
    if reason := why_unsafe(folder):
        return reason
    return None if os.access(folder, os.W_OK | os.X_OK) else f"{folder} is not writable"


class LibraryCache:
    """The libraries in one folder. Names of entries begin with a key of what was compiled, then of the compiler."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find(self, key: str, compilers: Sequence[str]) -> Path | None:
        """A library of the first of these compilers that has made one, by their identities; where there are none, of
        any compiler. None if there is none that is whole and ours."""
        if why_unsafe(self.folder):
            return None
        if compilers:
            candidates = [self.folder / entry_name(key, compiler) for compiler in compilers]
        else:
            candidates = _sorted_by_age(self.folder.glob(f"{key}-*"))
        return next(filter(None, map(_library, candidates)), None)

    @contextmanager
    def staged(self, key: str) -> Iterator[Path]:
        """An empty folder for `install` of a library of this key, which is removed in any case."""
        path = Path(tempfile.mkdtemp(prefix=f"{_STAGED}{key}-", dir=self.folder))
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)

    def install(self, staged: Path, name: str, about: Mapping[str, str]) -> Path:
        """Make a staged folder with a library an entry, and remove the oldest entries. The library's path."""
        content = (staged / LIBRARY).read_bytes()
        record = {**about, "sha256": hashlib.sha256(content).hexdigest()}
        (staged / _RECORD).write_text(json.dumps(record, indent=1) + "\n")
        for path in staged.iterdir():
            path.chmod(0o644)
            _sync(path)
        staged.chmod(0o755)
        self.remove(name)  # it was damaged
        staged.rename(self.folder / name)
        for old in _sorted_by_age(self.folder.glob(_ENTRIES))[_MAX_ENTRIES:]:
            self.remove(old.name)
        return self.folder / name / LIBRARY

    def remove(self, name: str) -> None:
        """Delete an entry, if there is one. Processes that have loaded its library keep it."""
        aside = self.folder / f"{_STAGED}{name}-{os.getpid()}"
        with suppress(FileNotFoundError):
            (self.folder / name).rename(aside)
        shutil.rmtree(aside, ignore_errors=True)

    def entries(self) -> list[Entry]:
        """By name."""
        found = []
        for folder in sorted(self.folder.glob(_ENTRIES)):
            with suppress(OSError, ValueError, KeyError, TypeError):
                about = json.loads((folder / _RECORD).read_bytes())
                found.append(Entry(folder, str(about["compiler"]), str(about["version"])))
        return found

    @contextmanager
    def locked(self, key: str, timeout_s: float, check: Callable[[], None]) -> Iterator[None]:
        """Only one process at a time compiles the libraries of a key. Removes what killed ones have left. `check` is
        called while waiting, and raises to stop. TimeoutError if others hold the lock for too long."""
        with _lock(self.folder / f"{_LOCK}{key}", timeout_s, check) as is_locked:
            if is_locked:
                self._remove_left(key)
                for other in {path.name.removeprefix(_STAGED).split("-")[0] for path in self._left()} - {key}:
                    self._remove_of_killed(other)
            yield

    def _left(self, key: str = "") -> Iterator[Path]:
        """Folders that processes which compile a key use, or have left when they were killed."""
        return self.folder.glob(f"{_STAGED}{key}*")

    def _remove_of_killed(self, key: str) -> None:
        """Remove what processes that compiled another key have left, unless one is at it."""
        with suppress(TimeoutError), _lock(self.folder / f"{_LOCK}{key}", 0.0, lambda: None) as is_locked:
            if is_locked:
                self._remove_left(key)

    def _remove_left(self, key: str) -> None:
        for path in self._left(key):
            shutil.rmtree(path, ignore_errors=True)


def entry_name(key: str, compiler: str) -> str:
    """Of the library that a compiler makes. `compiler`: its identity."""
    return f"{key}-{hashlib.sha256(os.fsencode(compiler)).hexdigest()[:8]}"


@contextmanager
def _lock(path: Path, timeout_s: float, check: Callable[[], None]) -> Iterator[bool]:
    """Hold the lock of a file, which is removed afterwards. The lock of a process that was killed is free.

    False where the file system has no locks; then two processes may compile the same, which is harmless.
    """
    handle = _acquired(path, timeout_s, check)
    try:
        yield handle is not None
    finally:
        if handle is not None:
            path.unlink(missing_ok=True)
            os.close(handle)


def _acquired(path: Path, timeout_s: float, check: Callable[[], None]) -> int | None:
    """The file, open and locked; None where there are no locks."""
    deadline = time.monotonic() + timeout_s
    while True:
        handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(handle, path):  # else whoever held the lock has removed the file
                return handle
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(handle)
                raise TimeoutError(f"another process has been compiling for {timeout_s:g} s") from None
        except OSError:
            os.close(handle)
            return None
        os.close(handle)
        check()
        time.sleep(_POLL_S)


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _library(entry: Path) -> Path | None:
    """The library of an entry if it is whole and ours, marked as used."""
    library, record = entry / LIBRARY, entry / _RECORD
    with suppress(OSError, ValueError, KeyError, TypeError):
        for path in (entry, library, record):
            if not _is_ours(path) or _is_writable_by_others(path):
                return None
        if hashlib.sha256(library.read_bytes()).hexdigest() == json.loads(record.read_bytes())["sha256"]:
            with suppress(OSError):
                os.utime(entry)
            return library
    return None


def _is_ours(path: Path) -> bool:
    """This user's or root's."""
    return path.stat().st_uid in (os.geteuid(), 0)


def _is_writable_by_others(path: Path) -> bool:
    return bool(path.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH))


def _sorted_by_age(folders: Iterator[Path]) -> list[Path]:
    """The one used last is the first."""
    ages = {}
    for folder in folders:
        with suppress(OSError):  # removed just now
            ages[folder] = -folder.stat().st_mtime_ns
    return sorted(ages, key=lambda folder: ages[folder])


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
