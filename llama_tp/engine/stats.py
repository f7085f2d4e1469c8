"""Engine statistics as one value, for logs, benchmarks and metrics exporters."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

STEP_BOUNDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
"""Upper bounds of histogram buckets for the durations of steps, in seconds."""
REQUEST_BOUNDS = (*STEP_BOUNDS[3:], 10.0, 20.0, 50.0, 100.0, 200.0, 500.0)
"""The same for the durations of requests."""


@dataclass(frozen=True, slots=True)
class HistogramSnapshot:
    bounds: tuple[float, ...]
    """Upper bounds of the buckets, in seconds."""
    counts: tuple[int, ...]
    """Per bucket, then above all bounds. A value equal to a bound belongs to its bucket."""
    total: float
    """Sum of all values, in seconds."""


class Histogram:
    """Counts durations. One thread adds; others may read at any time."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0.0

    def add(self, seconds: float, count: int = 1) -> None:
        """Count a duration, `count` times."""
        self._counts[bisect_left(self._bounds, seconds)] += count
        self._total += seconds * count

    def snapshot(self) -> HistogramSnapshot:
        return HistogramSnapshot(self._bounds, tuple(self._counts), self._total)


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
    drafted_tokens: int
    """Predicted tokens that steps computed."""
    accepted_tokens: int
    """How many of those were right: generated without a step of their own."""
    step_seconds: HistogramSnapshot
    """Durations of steps that computed something."""
    queue_seconds: HistogramSnapshot
    """Per request: from its arrival until it first held KV cache."""
    inter_token_seconds: HistogramSnapshot
    """Per generated token but an output's first: since the output's previous one."""
