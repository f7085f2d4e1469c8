"""Render a chat template in a process of its own, whose time and memory are limited."""

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
from threading import Lock
from time import monotonic
from typing import Any

from llama_tp.text.template_renderer import MAX_CPU_S, to_line

log = logging.getLogger(__name__)

_MAX_WAIT_S = 30.0
"""For an answer, in case the process gets hardly any CPU time. Its own limit, in CPU time, ends all else earlier."""


class TemplateRefusal(Exception):
    """The template called raise_exception."""


class TemplateFailure(Exception):
    """The template failed, or took too much time or memory."""


class TemplateProcess:
    """One compiled template, in a process that starts with the first rendering and ends with this object.

    Why a process: nothing inside Python can interrupt a template in every place; see `template_renderer`. A rendering
    costs 0.05 ms more than in this process, the first one 0.1 s, and the process 24 MB. Thread-safe.
    """

    def __init__(self, source: str) -> None:
        self._source = source
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = Lock()

    def check(self) -> None:
        """ValueError if the template does not compile. No process is left."""
        with self._lock:
            self._running()
            self._end()

    def render(self, variables: Mapping[str, Any]) -> str:
        """The text of the template with these variables, which must be JSON.

        TemplateRefusal or TemplateFailure with the reason; the next rendering is not affected.
        """
        with self._lock:
            answer = self._ask(self._running(), variables)
        if "refused" in answer:
            raise TemplateRefusal(answer["refused"])
        if "failed" in answer:
            raise TemplateFailure(answer["failed"])
        return answer["rendered"]

    def close(self) -> None:
        """End the process; another rendering would start it again."""
        with self._lock:
            self._end()

    def __del__(self) -> None:
        with suppress(Exception):  # at the interpreter's exit, modules may be gone
            self._end()

    def _running(self) -> subprocess.Popen[bytes]:
        """The process, with the template compiled. ValueError if it does not compile."""
        if self._process is not None and self._process.poll() is None:
            return self._process
        self._end()
        self._process = _start()
        try:
            answer = self._ask(self._process, {"template": self._source})
        except TemplateFailure as error:
            answer = {"invalid": str(error)}
        if "invalid" in answer:
            self._end()
            raise ValueError(f"the tokenizer's chat_template does not compile: {answer['invalid']}")
        return self._process

    def _ask(self, process: subprocess.Popen[bytes], question: Mapping[str, Any]) -> dict[str, str]:
        """The process's answer. TemplateFailure, and no process is left, if there is none."""
        assert process.stdin is not None
        assert process.stdout is not None
        line = b""
        with suppress(BrokenPipeError):
            process.stdin.write(to_line(question))
            process.stdin.flush()
            line = _read_line(process.stdout.fileno(), monotonic() + _MAX_WAIT_S)
        if line.endswith(b"\n"):
            answer: dict[str, str] = json.loads(line)
            return answer
        reason = self._why_silent(process)
        log.error("the chat template failed: %s", reason)
        raise TemplateFailure(reason)

    def _why_silent(self, process: subprocess.Popen[bytes]) -> str:
        if process.poll() is None:
            with suppress(subprocess.TimeoutExpired):
                process.wait(2.0)  # its pipe is closed before its end can be seen
        status = process.poll()
        self._end()
        if status == -signal.SIGPROF:
            return f"it took more than {MAX_CPU_S:g} s of CPU time"
        if status is None:
            return f"it gave no answer for {_MAX_WAIT_S:g} s"
        return f"its process ended with exit code {status}"

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with suppress(OSError):
                if pipe is not None:
                    pipe.close()


def _start() -> subprocess.Popen[bytes]:
    """The renderer, which finds modules where this process does. RuntimeError if it cannot be started."""
    program = "from llama_tp.text.template_renderer import main; main()"
    paths = os.pathsep.join(filter(None, sys.path))
    # Without RANK and LOCAL_RANK, by which ranks are found.
    variables = {name: value for name, value in os.environ.items() if not name.endswith("RANK")} | {"PYTHONPATH": paths}
    try:
        return subprocess.Popen(
            [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=variables
        )
    except OSError as error:
        raise RuntimeError(f"the process that renders chat templates cannot be started: {error}") from error


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
