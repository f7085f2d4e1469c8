"""Sections in child processes: for other programs, for several ranks, and for code that may hang.

A child runs gpu_check.py --child NAME and prints its results as lines `RESULT ["key", value]`.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from gpu.device import SMOKE
from gpu.report import ENTRY, Report

_MARK = "RESULT "
_TORCHRUN = ["-m", "torch.distributed.run", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]


def emit(key: str, value: Any) -> None:
    """Print a child's result in a single write: ranks share the pipe, and print() splits lines."""
    os.write(1, f"{_MARK}{json.dumps([key, value], default=str)}\n".encode())


def results_in(line: str) -> Iterator[tuple[str, Any]]:
    """Results in a line of output, which may contain several, and other text."""
    decoder = json.JSONDecoder()
    at = line.find(_MARK)
    while at >= 0:
        at += len(_MARK)
        with suppress(ValueError, TypeError):
            (key, value), at = decoder.raw_decode(line, at)
            yield key, value
        at = line.find(_MARK, at)


def run_child(
    report: Report,
    name: str,
    options: list[str],
    *,
    num_ranks: int = 0,
    python: str = sys.executable,
    env: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Run --child NAME, under torchrun if it has ranks, and record its results as they come. It is killed when the
    section's time is up. Returns all results."""
    launcher = [*_TORCHRUN, "--nproc-per-node", str(num_ranks)] if num_ranks else []
    command = [python, "-u", *launcher, str(ENTRY), "--child", name, *options, *(["--cpu-smoke"] if SMOKE else [])]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        env={**os.environ, **({"OMP_NUM_THREADS": "1"} if SMOKE else {}), **(env or {})},
    )
    found: dict[str, Any] = {}
    lines: list[str] = []
    limit_s = max(3.0, report.left() - 2)
    try:
        for line in _lines_of(process, time.monotonic() + limit_s):
            lines.append(line)
            for key, value in results_in(line):
                found[key] = report.put(key, value)
        if process.poll() is None:
            report.expect("child", False, f"killed after {limit_s:.0f} s")
        elif process.returncode:
            report.expect("child", False, f"exit code {process.returncode}")
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        report.data[report.section]["log_tail"] = lines[-25:]
        if not found or process.returncode:
            print("\n".join(lines[-25:]), flush=True)
    return found


def _lines_of(process: subprocess.Popen[bytes], deadline: float) -> Iterator[str]:
    """A process's output, until it exits or the deadline passes. Its children may keep the pipe open longer."""
    assert process.stdout is not None
    os.set_blocking(process.stdout.fileno(), False)
    rest = b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while (left := deadline - time.monotonic()) > 0:
            has_ended = process.poll() is not None
            ready = selector.select(timeout=0 if has_ended else min(0.2, left))
            chunk = process.stdout.read() if ready else None
            if chunk:
                *whole, rest = (rest + chunk).split(b"\n")
                yield from (line.decode(errors="replace") for line in whole)
            elif has_ended:
                break
            elif ready:  # the pipe is closed, the process is about to exit
                time.sleep(0.02)
    if rest:
        yield rest.decode(errors="replace")
