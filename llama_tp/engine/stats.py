"""How an engine is doing, as one value: for logs, benchmarks and whoever exports metrics."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

BOUNDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
"""Upper bounds of a histogram's buckets, in seconds; the last bucket has none."""


@dataclass(frozen=True, slots=True)
class HistogramSnapshot:
    counts: tuple[int, ...]
    """Of each bucket of BOUNDS, and of what lies above."""
    total: float
    """Sum of all values, in seconds."""


class Histogram:
    """Counts durations. One thread adds; others may look at any time."""

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
    """Counters since the start, and how things stand now."""

    running: int
    """Outputs that hold KV cache."""
    waiting: int
    """Outputs that hold none yet, or no more."""
    pages_used: int
    """Pages that sequences refer to; pages that are merely kept for later prompts do not count."""
    pages_total: int
    preemptions: int
    prompt_tokens: int
    """Tokens of all sequences that were admitted, again after each preemption."""
    prefix_hit_tokens: int
    """How many of them were found in the cache."""
    tokens_out: int
    """Tokens that became part of an output."""
    step_seconds: HistogramSnapshot
    """Of steps that computed something."""
