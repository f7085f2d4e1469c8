"""Verify the hashes of a checkpoint's large files while the weights are read."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from time import monotonic

from llama_tp.checkpoint.store.hash_cache import FileState, recall, remember
from llama_tp.checkpoint.store.manifest import load_manifest
from llama_tp.checkpoint.store.verify import SMALL, check_hash
from llama_tp.parallel.agreement import agree, gather
from llama_tp.threads import num_io_threads

log = logging.getLogger(__name__)


class LoadVerification:
    """Hashes files in threads while the body of the context reads them. The ranks of a host divide the files.

    Hashing and reading share the page cache, so the disk is read once.
    """

    def __init__(self, folder: str | Path, policy: str) -> None:
        """`policy`: always; once (skip files that were hashed before and have not changed); size (no files).

        Small files are excluded: the quick check of `verify` hashes them at every load.
        """
        self._folder = Path(folder)
        large = {name: entry for name, entry in load_manifest(folder).files.items() if entry.size > SMALL}
        known = recall(self._folder) if policy == "once" else set()
        self._unchanged = {name: state for name, state in known if name in large and self._is_unchanged(name, state)}
        pending = sorted(large.keys() - self._unchanged.keys()) if policy != "size" else []
        self._num_bytes = sum(large[name].size for name in pending)
        self._local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        share = pending[self._local_rank :: int(os.environ.get("LOCAL_WORLD_SIZE", "1"))]
        self._entries = {name: large[name] for name in share}
        self._is_aborted = False

    def __enter__(self) -> LoadVerification:
        self._start = monotonic()
        self._pool = ThreadPoolExecutor(num_io_threads(), thread_name_prefix="verify")
        self._hashing: dict[str, Future[FileState | None]] = {
            name: self._pool.submit(check_hash, self._folder / name, entry, self._stop_if_aborted)
            for name, entry in self._entries.items()
        }
        if self._is_reporting():
            log.info("hashing %.1f GB of %s while loading it", self._num_bytes / 1e9, self._folder)
        return self

    def __exit__(self, *_error: object) -> None:
        self._is_aborted = True
        self._pool.shutdown(cancel_futures=True)

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """Run a body that fails on all ranks or on none: a damaged file is reported by its hash, not by the error that
        it led to."""
        try:
            yield
        except ValueError:
            self.finish()
            raise

    def finish(self) -> None:
        """Called on all ranks: wait for the threads of all. ValueError on all ranks names a file that has changed
        since it was written. Otherwise the result is recorded for the policy `once`."""
        states = agree(lambda: {name: hashing.result() for name, hashing in self._hashing.items()})
        host = os.environ.get("GROUP_RANK")
        shares = gather((host, states))
        if not self._is_reporting():
            return
        hashed = {name: state for at, share in shares if at == host for name, state in share.items() if state}
        path = remember(self._folder, {**self._unchanged, **hashed}) if hashed else None
        log.info(
            "%s matches its manifest: hashed %.1f GB in %.1f s, %s",
            self._folder,
            self._num_bytes / 1e9,
            monotonic() - self._start,
            f"recorded in {path}" if path else "not recorded",
        )

    def _is_reporting(self) -> bool:
        """Whether this rank reports for its host, and any file is hashed."""
        return self._local_rank == 0 and self._num_bytes > 0

    def _is_unchanged(self, name: str, state: FileState) -> bool:
        path = self._folder / name
        return path.is_file() and FileState.of(path) == state

    def _stop_if_aborted(self, _size: int) -> None:
        if self._is_aborted:
            raise InterruptedError("the load was aborted")
