"""Compile C++ kernels in the background, once for each machine."""

from __future__ import annotations

import errno
import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from llama_tp.model.cpu.build_worker import Job, ended
from llama_tp.model.cpu.compiler import find_compilers, why_none
from llama_tp.model.cpu.library_cache import LibraryCache, user_folder, why_unsafe, why_unwritable
from llama_tp.model.cpu.sources import Sources

log = logging.getLogger(__name__)

TIMEOUT_S = 120.0
_CLOSE_S = 5.0
_PROGRAM = "import os; os.nice(19); from llama_tp.model.cpu.build_worker import main; main()"


_FOLDER = Path(__file__).parent
_FLAGS = ("-O3", "-march=native", "-std=c++20", "-fno-math-errno", "-fPIC", "-shared", "-w", "-pthread")


def build_kernels(*flags: str, delay_s: float = 0.0) -> Build:
    """Start to compile the kernels of this folder for this machine, as `start_build`. flags: more of them."""
    sources = [_FOLDER / "kernels.cpp", *sorted(_FOLDER.glob("*.h"))]
    return start_build(sources, (*_FLAGS, *flags), delay_s=delay_s)


class Build:
    """A library that is being compiled, unless the cache has it. Its process ends with this object."""

    def __init__(self, sources: Sources, timeout_s: float, delay_s: float) -> None:
        self.error: str | None = None
        """Why there will be no library, in one line."""
        self._sources = sources
        self._timeout_s = timeout_s
        self._delay_s = delay_s
        self._library: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._is_discarded = False
        self._begin()

    def library(self) -> Path | None:
        """The path of the library. None if it is not compiled yet, or if there is an `error`."""
        if self._process is not None and self._process.poll() is not None:
            self._finish(self._process)
        return self._library

    def wait(self, timeout_s: float | None = None) -> Path | None:
        """As `library`, after the end of the compilation or this time."""
        if self._process is not None:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout_s)
        return self.library()

    def discard(self, reason: str) -> None:
        """Remove the library, which cannot be loaded for this reason, and compile it anew; the second time there is an
        `error`. Processes that have loaded it keep it."""
        library = self.library()
        assert library is not None, "there is no library"
        self._library = None
        log.warning("%s cannot be loaded: %s", library, reason)
        try:
            LibraryCache(library.parent.parent).remove(library.parent.name)
        except OSError as error:
            reason = f"{reason}, and it cannot be removed: {error.strerror}"
            self._is_discarded = True
        if self._is_discarded:
            self.error = f"{library} cannot be loaded: {reason}; set LLAMA_TP_CACHE to another folder"
            return
        self._is_discarded = True
        self._begin()

    def close(self) -> None:
        """Stop compiling. A library in a temporary folder is removed."""
        process, self._process = self._process, None
        if process is not None:
            for pipe in (process.stdin, process.stdout):
                with suppress(OSError):
                    assert pipe is not None
                    pipe.close()  # at the end of its stdin the process ends, and the compiler with it
            try:
                process.wait(_CLOSE_S)
            except subprocess.TimeoutExpired:  # it was stopped, or its disk does not answer
                process.kill()
        temporary, self._temporary = self._temporary, None
        if temporary is not None:
            with suppress(OSError):
                temporary.cleanup()

    def __del__(self) -> None:
        # At the interpreter's exit, modules may be gone, and `suppress` with them.
        try:  # noqa: SIM105
            self.close()
        except Exception:
            pass

    def _begin(self) -> None:
        compilers = find_compilers()
        try:
            key = self._sources.key()
        except OSError as error:
            self.error = f"{error.filename}: {error.strerror}; install llama-tp again"
            return
        folder, reason = _cache()
        if folder is not None:
            self._library = LibraryCache(folder).find(key, [one.identity for one in compilers])
        if self._library is not None:
            return
        if not compilers:
            self.error = why_none()
            return
        if folder is not None:
            reason = why_unwritable(folder)
        try:
            if folder is None or reason is not None:
                log.warning("compiled kernels are not kept: %s; set LLAMA_TP_CACHE to a folder of your own", reason)
                self._temporary = tempfile.TemporaryDirectory(prefix="llama_tp-kernels-")
                folder = Path(self._temporary.name)
            job = Job(
                str(folder),
                key,
                tuple(str(path.absolute()) for path in self._sources.files),
                self._sources.flags,
                tuple((one.command, one.identity) for one in compilers),
                self._timeout_s,
                self._delay_s,
            )
            self._process = _start(job)
        except OSError as error:
            self.error = f"kernels cannot be compiled: {error}"

    def _finish(self, process: subprocess.Popen[bytes]) -> None:
        """Take the result of the process, which has ended."""
        assert process.stdout is not None
        answer = process.stdout.read()
        self._process = None
        for pipe in (process.stdin, process.stdout):
            with suppress(OSError):
                assert pipe is not None
                pipe.close()
        try:
            result = json.loads(answer)
        except ValueError:
            result = {"error": f"the process that compiles kernels {ended(process.returncode)}"}
        if "library" in result:
            self._library = Path(result["library"])
        else:
            self.error = f"kernels cannot be compiled: {result['error']}; {_remedy(result['error'])}"


def start_build(
    sources: Sequence[Path], flags: Sequence[str], *, timeout_s: float = TIMEOUT_S, delay_s: float = 0.0
) -> Build:
    """Compile C++ files to one shared library, in a process of low priority, unless the cache has it.

    sources: all files that it depends on; headers are only watched for changes. Several processes that start the same
    build compile once. Never raises for what may be wrong with the machine: see `Build.error`.

    timeout_s: how long a compiler may do nothing before it is ended. delay_s: before it starts.
    """
    return Build(Sources(tuple(sources), tuple(flags)), timeout_s, delay_s)


def _remedy(error: str) -> str:
    if os.strerror(errno.ENOSPC) in error:
        return "free some space, or set LLAMA_TP_CACHE to a folder on another disk"
    return "install g++ 10 or newer, or set CXX to another compiler"


def _cache() -> tuple[Path | None, str | None]:
    """The folder of the user's cache, or why it cannot be used."""
    try:
        folder = user_folder()
    except ValueError as error:
        return None, str(error)
    reason = why_unsafe(folder)
    return (None, reason) if reason else (folder, None)


def _start(job: Job) -> subprocess.Popen[bytes]:
    paths = os.pathsep.join(filter(None, sys.path))  # so that it finds modules where this process does
    # Without RANK and LOCAL_RANK, by which ranks are found.
    variables = {name: value for name, value in os.environ.items() if not name.endswith("RANK")}
    process = subprocess.Popen(
        [sys.executable, "-c", _PROGRAM],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**variables, "PYTHONPATH": paths},
    )
    assert process.stdin is not None
    with suppress(BrokenPipeError):  # it has ended already, which is seen later
        process.stdin.write(job.to_line())
        process.stdin.flush()
    return process
