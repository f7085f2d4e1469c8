"""Engine statistics as one value, for logs, benchmarks and metrics exporters."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

BOUNDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
"""Upper bounds of the histogram buckets, in seconds; the last bucket is unbounded."""


@dataclass(frozen=True, slots=True)
class HistogramSnapshot:
    counts: tuple[int, ...]
    """Per bucket of BOUNDS, then above all of them."""
    total: float
    """Sum of all values, in seconds."""


class Histogram:
    """Counts durations. One thread adds; others may read at any time."""

    def __init__(self) -> None:
        self._counts = [0] * (len(BOUNDS) + 1)
        self._total = 0.0

    def add(self, seconds: float) -> None:
        self._counts[bisect_left(BOUNDS, seconds)] += 1
        self._total += seconds

    def snapshot(self) -> HistogramSnapshot:
        return HistogramSnapshot(tuple(self._counts), self._total)


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counters since startup, and current gauges."""

    running: int
    """Outputs that hold KV cache."""
    waiting: int
    """Outputs that do not hold KV cache, yet or any more."""
    pages_used: int
    """Pages that sequences refer to, without those only cached for later prompts."""
    pages_total: int
    preemptions: int
    prompt_tokens: int
    """Tokens of all admitted sequences, counted again after each preemption."""
    prefix_hit_tokens: int
    """How many of those were found in the cache."""
    tokens_out: int
    """Generated tokens."""
    step_seconds: HistogramSnapshot
    """Durations of steps that computed something."""
