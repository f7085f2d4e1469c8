"""The process that compiles, at low priority.

It ends, and the compiler with it, as soon as its stdin is closed: when its parent does so or dies. A signal at the
parent's death (PR_SET_PDEATHSIG) would come too early: it comes when the thread ends that started the process.

Protocol: a `Job` as one line of JSON on stdin; one line of JSON on stdout, with the library or the error.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import resource
import select
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from time import monotonic
from typing import NoReturn

from llama_tp import __version__
from llama_tp.model.cpu.compiler import Compiler
from llama_tp.model.cpu.library_cache import LIBRARY, LibraryCache, entry_name
from llama_tp.model.cpu.sources import Sources

_MAX_CPU_S = 600
"""Of CPU time, for a compiler that computes forever."""
_MAX_OUTPUT = 1 << 16
_POLL_S = 0.1
_LOCK_TIMEOUT_S = 900.0
_LOAD = "import ctypes, sys; ctypes.CDLL(sys.argv[1])"
_SHOWN = 300


class CompileError(Exception):
    """A compiler does not make the library, in one line."""


@dataclass(frozen=True, slots=True)
class Job:
    """What to compile, and where to."""

    folder: str
    """Of the cache."""
    key: str
    """Of the entry, without the compiler."""
    sources: tuple[str, ...]
    flags: tuple[str, ...]
    compilers: tuple[tuple[tuple[str, ...], str], ...]
    """Command and identity of each one to try, in order."""
    timeout_s: float
    """How long a compiler may do nothing."""
    delay_s: float = 0.0
    """Before it starts."""

    def to_line(self) -> bytes:
        return json.dumps(asdict(self)).encode() + b"\n"

    @classmethod
    def of_line(cls, line: bytes) -> Job:
        return cls(**json.loads(line))


def main() -> None:
    """Do the job on stdin, and print its result."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's; its end closes stdin
    signal.signal(signal.SIGTERM, _exit)
    with suppress(OSError):  # not Linux
        Path("/proc/self/oom_score_adj").write_text("1000")  # if memory runs out, end this and not a server
    job = Job.of_line(sys.stdin.buffer.readline())
    _exit_if_alone(job.delay_s)
    try:
        result = {"library": str(compiled(job))}
    except (CompileError, TimeoutError) as error:
        result = {"error": str(error)}
    except OSError as error:
        result = {"error": f"{error.filename or job.folder}: {error.strerror}"}
    print(json.dumps(result), flush=True)


def compiled(job: Job) -> Path:
    """The library, by the first compiler that can make it, unless another process has just done so. CompileError says
    why each of them cannot; OSError if the cache cannot be written."""
    cache = LibraryCache(Path(job.folder))
    compilers = [Compiler(tuple(command), identity) for command, identity in job.compilers]
    with cache.locked(job.key, _LOCK_TIMEOUT_S, _exit_if_alone):
        if found := cache.find(job.key, [one.identity for one in compilers]):
            return found
        errors = []
        for compiler in compilers:
            try:
                return _compiled_by(compiler, job, cache)
            except CompileError as error:
                errors.append(str(error))
    raise CompileError("; ".join(errors))


def _compiled_by(compiler: Compiler, job: Job, cache: LibraryCache) -> Path:
    sources = Sources(tuple(map(Path, job.sources)), tuple(job.flags))
    with cache.staged(job.key) as staged:
        temporary, library = staged / "tmp", staged / LIBRARY
        temporary.mkdir()
        _run(sources.command(compiler, library), temporary, job.timeout_s)
        if not library.is_file():
            raise CompileError(f"{compiler.name} reported success, but wrote no library")
        _run([sys.executable, "-c", _LOAD, str(library)], temporary, job.timeout_s, subject="the compiled library")
        if sources.key() != job.key:
            raise CompileError("the sources were changed while they were compiled; start again")
        temporary.rmdir()
        about = {"compiler": compiler.name, "version": __version__}
        return cache.install(staged, entry_name(job.key, compiler.identity), about)


def _run(command: Sequence[str], temporary: Path, timeout_s: float, subject: str | None = None) -> None:
    """Run a program to its end, with its temporary files in a folder. CompileError if it fails or does nothing for too
    long; exits if this process's parent is gone. No process of the program is left in any case."""
    subject = subject or command[0]
    environment = {**os.environ, "LC_ALL": "C", "TMPDIR": str(temporary)}
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            preexec_fn=_set_apart,
        )
    except OSError as error:
        raise CompileError(f"{subject} cannot be started: {error.strerror}") from None
    try:
        output = _output(process, timeout_s)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        status = process.wait()
    if output is None:
        raise CompileError(f"{subject} did nothing for {timeout_s:g} s and was ended")
    if status:
        raise CompileError(f"{subject} {ended(status)}{_first_error(output)}")


def _set_apart() -> None:
    """In the new process. It leads a group, dies with this one, and its processes end when they have computed for too
    long."""
    # A session of its own would make its priority void: Linux shares CPUs out between sessions first (sched(7), "The
    # autogroup feature").
    os.setpgid(0, 0)
    pr_set_pdeathsig = 1
    with suppress(AttributeError):  # not Linux
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    with suppress(ValueError, OSError):  # a lower limit applies already
        resource.setrlimit(resource.RLIMIT_CPU, (_MAX_CPU_S, _MAX_CPU_S))


def _output(process: subprocess.Popen[bytes], timeout_s: float) -> bytes | None:
    """What it has printed when it ends, or the beginning of it. None if it stops computing for too long. A time limit
    alone would end a compiler that gets hardly any CPU time beside a busy server."""
    assert process.stdout is not None
    pipe = process.stdout.fileno()
    os.set_blocking(pipe, False)
    output, is_open = b"", True
    used, progress_at = 0, monotonic()
    look_at = 0.0
    while process.poll() is None:
        _exit_if_alone()
        select.select([sys.stdin, *([pipe] if is_open else [])], [], [], _POLL_S)
        with suppress(BlockingIOError):
            part = os.read(pipe, _MAX_OUTPUT)
            output, is_open = (output + part)[:_MAX_OUTPUT], bool(part)
        if monotonic() < look_at:
            continue
        look_at = monotonic() + min(1.0, timeout_s / 4)
        if (now_used := _cpu_time(process.pid)) != used:
            used, progress_at = now_used, monotonic()
        elif monotonic() - progress_at > timeout_s:
            return None
    with suppress(BlockingIOError):
        while len(output) < _MAX_OUTPUT and (part := os.read(pipe, _MAX_OUTPUT)):
            output += part
    return output


def _cpu_time(group: int) -> int:
    """Of the running processes of a group, in clock ticks."""
    total = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError, IndexError):
            fields = path.read_text(errors="replace").rpartition(")")[2].split()
            if int(fields[2]) == group:
                total += int(fields[11]) + int(fields[12])
    return total


def _exit_if_alone(within_s: float = 0.0) -> None:
    """Exit if stdin is closed, or is closed within this time."""
    readable, _, _ = select.select([sys.stdin], [], [], within_s)
    if readable:
        _exit()


def _exit(*_: object) -> NoReturn:
    sys.exit(1)


def ended(status: int) -> str:
    """How a process has ended, by its return code."""
    if status > 0:
        return f"failed with exit code {status}"
    try:
        return f"was ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"was ended by signal {-status}"


def _first_error(output: bytes) -> str:
    """The first line of a program's output that is about an error, else the last line."""
    lines = [line.strip() for line in output.decode("utf-8", "replace").splitlines() if line.strip()]
    pattern = re.compile(r"error|undefined reference|cannot find|No space left", re.IGNORECASE)
    shown = next(filter(pattern.search, lines), lines[-1] if lines else "")
    printable = "".join(char if char.isprintable() else "?" for char in shown)
    return f": {printable[:_SHOWN]}" if printable else ""
