"""The side of a `LimitedProcess` that answers.

The kernel sets its limits: CPU time per question (SIGPROF ends the process, even inside one long C call) and address
space.

Protocol: one JSON object a line, in UTF-8 with surrogates; each question gets one answer.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Limits:
    """What the process may take."""

    cpu_s: float
    """CPU time per question."""
    memory: int
    """Bytes of address space."""


def serve(answer: Callable[[dict[str, Any]], Mapping[str, Any]], limits: Limits, too_large: Mapping[str, Any]) -> None:
    """Answer the lines of stdin until it ends. `too_large`: the answer if there is no memory to send another one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's; its end closes stdin
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    with suppress(ValueError, OSError):  # a lower hard limit applies already, or the system has none
        resource.setrlimit(resource.RLIMIT_AS, (limits.memory, limits.memory))
    for line in sys.stdin.buffer:
        question = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, limits.cpu_s)
        reply = answer(question)
        signal.setitimer(signal.ITIMER_PROF, 0)
        try:
            sys.stdout.buffer.write(to_line(reply))
        except MemoryError:
            sys.stdout.buffer.write(to_line(too_large))
        sys.stdout.buffer.flush()


def to_line(message: Mapping[str, Any]) -> bytes:
    """The message as a line of JSON. Surrogates are written as they are: if they were escaped, the reader would join
    some pairs to one character."""
    return json.dumps(message, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"
