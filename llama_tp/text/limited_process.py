"""Run what may not end, or may take all memory, in a process whose CPU time and memory are limited.

Why a process: neither jinja2 nor llguidance can be interrupted everywhere. See `limited_worker` for its side.
"""

from __future__ import annotations

import json
import logging
import os
import select
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from time import monotonic
from typing import Any

from llama_tp.text.limited_worker import Limits, to_line

log = logging.getLogger(__name__)

_MAX_WAIT_S = 30.0
"""For an answer, in case the process gets hardly any CPU time. Its own limit, in CPU time, ends all else earlier."""


class ProcessFailure(Exception):
    """There is no answer: it would have taken too much time or memory."""


class LimitedProcess:
    """A process that answers questions, one at a time. It ends with this object, or when it exceeds a limit."""

    def __init__(self, module: str, limits: Limits, purpose: str) -> None:
        """module: the one whose `main()` it runs. purpose: the subject of log messages."""
        self._module = module
        self._limits = limits
        self._purpose = purpose
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> bool:
        """Start the process. False if it is already running; RuntimeError if that is impossible."""
        if self._process is not None and self._process.poll() is None:
            return False
        self.close()
        program = f"from {self._module} import main; main()"
        paths = os.pathsep.join(filter(None, sys.path))  # so that it finds modules where this process does
        # Without RANK and LOCAL_RANK, by which ranks are found.
        variables = {name: value for name, value in os.environ.items() if not name.endswith("RANK")}
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", program],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**variables, "PYTHONPATH": paths},
            )
        except OSError as error:
            raise RuntimeError(f"the process for {self._purpose} cannot be started: {error}") from error
        return True

    def ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """The answer of the started process. ProcessFailure with the reason, and the process has ended, if there is
        none."""
        process = self._process
        assert process is not None, "not started"
        assert process.stdin is not None
        assert process.stdout is not None
        line = b""
        with suppress(BrokenPipeError):
            process.stdin.write(to_line(question))
            process.stdin.flush()
            line = _read_line(process.stdout.fileno(), monotonic() + _MAX_WAIT_S)
        if line.endswith(b"\n"):
            answer: dict[str, Any] = json.loads(line)
            return answer
        reason = self._why_silent(process)
        log.error("%s failed: %s", self._purpose, reason)
        raise ProcessFailure(reason)

    def close(self) -> None:
        """End the process, if it is running."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with suppress(OSError):
                if pipe is not None:
                    pipe.close()

    def __del__(self) -> None:
        # At the interpreter's exit, modules may be gone, and `suppress` with them.
        try:  # noqa: SIM105
            self.close()
        except Exception:
            pass

    def _why_silent(self, process: subprocess.Popen[bytes]) -> str:
        if process.poll() is None:
            with suppress(subprocess.TimeoutExpired):
                process.wait(2.0)  # its pipe is closed before its end can be seen
        status = process.poll()
        self.close()
        if status == -signal.SIGPROF:
            return f"it took more than {self._limits.cpu_s:g} s of CPU time"
        if status is None:
            return f"it gave no answer for {_MAX_WAIT_S:g} s"
        return f"its process ended with exit code {status}"


def _read_line(file: int, deadline: float) -> bytes:
    """Up to and including the newline that ends the answer; less if the pipe is closed or time is up."""
    parts = []
    poll = select.poll()
    poll.register(file, select.POLLIN)
    while poll.poll(max(0.0, deadline - monotonic()) * 1000):
        part = os.read(file, 1 << 20)
        parts.append(part)
        if not part or part.endswith(b"\n"):
            break
    return b"".join(parts)
