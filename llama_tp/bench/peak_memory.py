"""Run a command in a process of its own and measure the peak of the memory that it allocates."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, sleep

_INTERVAL = 0.005
"""Seconds between two samples: fresh memory is filled at about 1 GB/s, so that a sample misses about 5 MB."""
_FIELDS = ("RssAnon:", "RssShmem:")


@dataclass(frozen=True, slots=True)
class Finished:
    """A command that succeeded."""

    output: str
    """What it wrote to stdout."""
    seconds: float
    """From the start of the process to its end."""
    peak_bytes: int
    """Largest sample of anonymous and shared memory: what the process allocates and has touched, its libraries' data
    included. Mapped files are not part of it, because the kernel can drop their pages. 0 where there is no /proc."""


def run_measured(command: Sequence[str | Path]) -> Finished:
    """Run a command to its end. RuntimeError with its last line of stderr if it fails."""
    start = perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        peak = 0
        while process.poll() is None:
            peak = max(peak, _allocated(process.pid))
            sleep(_INTERVAL)
        seconds = perf_counter() - start
        output, errors = process.communicate()
    if process.returncode:
        last = (errors.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"{' '.join(map(str, command))} exited with {process.returncode}: {last}")
    return Finished(output, seconds, peak)


def _allocated(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:  # it has just ended, or this is not Linux
        return 0
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith(_FIELDS))
