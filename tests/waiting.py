"""Waiting for what another thread or process does."""

from __future__ import annotations

import time
from collections.abc import Callable

PATIENCE_S = 60.0
"""Longer than anything takes that a test does not time, on the busiest machine."""


class SleepersClock:
    """In the place of the module `time`: a time that passes while its user sleeps, and only then."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def wait_until(condition: Callable[[], object], timeout_s: float = PATIENCE_S) -> bool:
    """Whether it has come true."""
    deadline = time.monotonic() + timeout_s
    while not (met := condition()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return bool(met)
