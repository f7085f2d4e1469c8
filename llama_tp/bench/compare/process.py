"""The parent's side of a contender's process: starts it, asks it, and says what became of it."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import monotonic
from typing import Any, NoReturn

from llama_tp.bench.contenders import Prompts, Timing
from llama_tp.bench.machine import cpu_seconds

_COMMAND = (sys.executable, "-m", "llama_tp.bench.compare.worker")


class ContenderFailed(Exception):
    """A contender has crashed, refused or not answered; the message is one line. Its process is gone."""


class ContenderProcess:
    """A contender in a process of its own, which is stopped whenever it is not asked for anything, so that no thread
    of it can disturb the others."""

    def __init__(
        self, environment: Mapping[str, str], log: Path, limit_s: float, command: Sequence[str] = _COMMAND
    ) -> None:
        """log: gets what the process prints. limit_s: the longest that it may take for one answer."""
        self._log = log
        self._limit_s = limit_s
        self._rest = b""
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, env=dict(environment)
            )

    def load(self, engine: str, work: Mapping[str, Any]) -> str:
        """Load the weights; returns the engine's version. ContenderFailed if it cannot."""
        return str(self._ask({"do": "load", "engine": engine, "work": work}, "while loading")["version"])

    def run(self, prompts: Prompts, new: int) -> Timing:
        """As `Contender.run`. ContenderFailed if it cannot."""
        answer = self._ask({"do": "run", "prompts": prompts, "new": new}, f"at batch {len(prompts)}")
        answer |= {name: tuple(answer[name]) for name in ("steps_s", "first_tokens")}
        return Timing(**answer)

    @property
    def cpu_s(self) -> float:
        """CPU seconds used so far; 0 after its end."""
        try:
            return cpu_seconds(f"/proc/{self._process.pid}/stat")
        except OSError:
            return 0.0

    def close(self) -> None:
        """End the process, whatever it is doing."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def _ask(self, request: Mapping[str, Any], when: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._signal(signal.SIGCONT)
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            self._fail(when)
        answer: dict[str, Any] = json.loads(self._read_line(when))
        self._signal(signal.SIGSTOP)
        if "error" in answer:
            self.close()
            raise ContenderFailed(f"{when}: {answer['error']}")
        return answer

    def _read_line(self, when: str) -> bytes:
        assert self._process.stdout is not None
        descriptor, end = self._process.stdout.fileno(), monotonic() + self._limit_s
        while b"\n" not in self._rest:
            left = end - monotonic()
            if left <= 0 or not select.select([descriptor], [], [], left)[0]:
                self.close()
                raise ContenderFailed(f"gave no answer for {self._limit_s:g} s {when}")
            data = os.read(descriptor, 1 << 16)
            if not data:
                self._fail(when)
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def _signal(self, number: signal.Signals) -> None:
        if self._process.poll() is None:
            os.kill(self._process.pid, number)

    def _fail(self, when: str) -> NoReturn:
        """ContenderFailed that says how the process has ended."""
        self._process.wait()
        code = self._process.returncode
        self.close()
        if code < 0:
            raise ContenderFailed(f"died with {signal.Signals(-code).name} {when}")
        lines = self._log.read_text(errors="replace").strip().splitlines()
        raise ContenderFailed(f"exited with {code} {when}" + (f": {lines[-1][:200]}" if lines else ""))
