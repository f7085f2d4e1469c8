"""A busy process beside a measurement: how an engine fares on cores that it does not have to itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from llama_tp.bench.machine import cpu_seconds

IDLE, BESIDE = "idle", "beside"
"""Conditions of a measurement: the cores to itself, or one busy process beside it."""
_SPIN = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL: also while it is stopped
parent = int(sys.argv[1])
if os.getppid() == parent:
    os.kill(os.getpid(), signal.SIGSTOP)
while os.getppid() == parent:
    for _ in range(1_000_000):
        pass
"""
"""Stops itself; once it is continued, computes on one core until its parent ends."""


class Neighbour:
    """One process that computes without pause while it is let. Use as a context; it is stopped at first."""

    def __enter__(self) -> Neighbour:
        command = [sys.executable, "-c", _SPIN, str(os.getpid())]
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        os.waitpid(self._process.pid, os.WUNTRACED)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    @property
    def cpu_s(self) -> float:
        """CPU seconds used so far."""
        return cpu_seconds(f"/proc/{self._process.pid}/stat")

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Let it compute inside of the context."""
        os.kill(self._process.pid, signal.SIGCONT)
        try:
            yield
        finally:
            os.kill(self._process.pid, signal.SIGSTOP)


@contextmanager
def conditions(*, with_neighbour: bool) -> Iterator[Conditions]:
    """The conditions to measure under, and how to create each of them."""
    if not with_neighbour:
        yield Conditions(None)
        return
    with Neighbour() as neighbour:
        yield Conditions(neighbour)


class Conditions:
    """The names of the conditions, and a context for each."""

    def __init__(self, neighbour: Neighbour | None) -> None:
        self._neighbour = neighbour
        self.names = (IDLE,) if neighbour is None else (IDLE, BESIDE)

    @contextmanager
    def under(self, name: str) -> Iterator[None]:
        if name == IDLE:
            yield
            return
        assert self._neighbour is not None
        with self._neighbour.busy():
            yield
