"""A file hashed while it is written, so that a checkpoint need not be read again for its manifest."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

from llama_tp.checkpoint.store.manifest import FileEntry

_LARGE = 1 << 20
"""A block of this size or more is hashed concurrently with its write, a smaller one before."""
_SYNC_BYTES = 512 << 20
"""Start a background sync after this many bytes, or the disk idles until the final sync. A quarter of this costs more
than it gains (measured): writes wait for the journal."""


class HashingFile:
    """Written sequentially, once; durable when the context ends.

    An error in a write (a full disk, the process exiting) is raised again when the context ends, because torch's zip
    writer continues after it and reports something else.
    """

    def __init__(self, path: Path, *, also_md5: bool = False) -> None:
        self.path = path
        self.size = 0
        self._digest = hashlib.sha256()
        self._md5 = hashlib.md5(usedforsecurity=False) if also_md5 else None
        self._error: BaseException | None = None
        self._sync: Future[None] | None = None
        self._next_sync = _SYNC_BYTES

    def __enter__(self) -> HashingFile:
        self._file = self.path.open("wb")
        self._pool = ThreadPoolExecutor(3)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._pool.shutdown()
        try:
            if kind is None:
                if self._sync is not None:
                    self._sync.result()
                self._file.flush()
                os.fsync(self._file.fileno())
            self._file.close()
        finally:
            if self._error is not None:
                raise self._error

    @property
    def entry(self) -> FileEntry:
        return FileEntry(self.size, self._digest.hexdigest())

    @property
    def md5(self) -> str:
        """In lower-case hex, of a file that was made with `also_md5`."""
        assert self._md5 is not None
        return self._md5.hexdigest()

    def write(self, block: Any) -> int:
        if self._error is not None:
            raise self._error
        size = memoryview(block).nbytes
        try:
            self._write(block, size)
            self._start_sync()
        except BaseException as error:
            self._error = error
            raise
        return size

    def flush(self) -> None:
        self._file.flush()

    def _write(self, block: Any, size: int) -> None:
        digests = [digest for digest in (self._digest, self._md5) if digest is not None]
        if size < _LARGE:
            for digest in digests:
                digest.update(block)
            self._file.write(block)
        else:
            hashed = [self._pool.submit(digest.update, block) for digest in digests]
            try:
                self._file.write(block)
            finally:
                for one in hashed:
                    one.result()
        self.size += size

    def _start_sync(self) -> None:
        if self.size >= self._next_sync and (self._sync is None or self._sync.done()):
            if self._sync is not None:
                self._sync.result()
            self._sync = self._pool.submit(os.fdatasync, self._file.fileno())
            self._next_sync = self.size + _SYNC_BYTES
