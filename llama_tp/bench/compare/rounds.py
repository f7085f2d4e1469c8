"""Which rounds count: those in which the machine did as much other work as in its calmest.

The load average also counts the benchmark itself, and lags by a minute. So it is only recorded; what decides is the CPU
time that all other processes used during a round, in cores. A round in which that was more than TOLERANCE above the
calmest round does not count, and is repeated, a limited number of times; then the calmest rounds count.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter

from llama_tp.bench.machine import busy_seconds, load_average

TOLERANCE = 0.25
"""Cores."""


@dataclass(frozen=True, slots=True)
class Round:
    """The machine during one round."""

    load_average: float
    """Before it."""
    other_cores: float
    """Cores that processes which are not the benchmark's used on average."""


class Meter:
    """Measures the work of others from its creation on. own_cpu_s: CPU seconds of the benchmark's other processes."""

    def __init__(self, own_cpu_s: Callable[[], float]) -> None:
        self._own_cpu_s = own_cpu_s
        self._load_average = load_average()
        self._start = perf_counter()
        self._others = self._now()

    def _now(self) -> float:
        own = os.times()
        return busy_seconds() - self._own_cpu_s() - own.user - own.system

    def round(self) -> Round:
        """The round that ends now."""
        seconds = max(1e-9, perf_counter() - self._start)
        return Round(self._load_average, max(0.0, (self._now() - self._others) / seconds))


def counting(rounds: Sequence[Round], wanted: int) -> list[int]:
    """The indices of the rounds that count: of all that are calm enough, the calmest."""
    calmest = min(one.other_cores for one in rounds)
    calm = [index for index, one in enumerate(rounds) if one.other_cores <= calmest + TOLERANCE]
    return sorted(sorted(calm, key=lambda index: rounds[index].other_cores)[:wanted])


def needs_another(rounds: Sequence[Round], wanted: int, repeats: int) -> bool:
    """Whether fewer rounds count than are wanted, and another one is allowed."""
    if len(rounds) < wanted:
        return True
    return len(counting(rounds, wanted)) < wanted and len(rounds) < wanted + repeats


def chosen(rounds: Sequence[Round], wanted: int) -> list[int]:
    """The indices of the rounds to report: those that count, filled up with the calmest others."""
    return sorted(sorted(range(len(rounds)), key=lambda index: rounds[index].other_cores)[:wanted])
