"""Measures what requests wait for in the engine: the queue, and each of their tokens. The scheduler has no clock."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as Items
from operator import attrgetter

from llama_tp.engine.sequence import Sequence
from llama_tp.engine.stats import REQUEST_BOUNDS, STEP_BOUNDS, Histogram

_sampled_at = attrgetter("sampled_at")


class Timing:
    """Histograms of queue and inter-token times. All times come from one monotonic clock, in seconds."""

    def __init__(self) -> None:
        self.queue = Histogram(REQUEST_BOUNDS)
        self.inter_token = Histogram(STEP_BOUNDS)
        self._arrivals: dict[str, float] = {}  # of requests that have never held KV cache

    def arrived(self, request_id: str, now: float) -> None:
        self._arrivals[request_id] = now

    def left(self, request_id: str) -> None:
        """The request has ended. One that ends in the queue is not counted."""
        self._arrivals.pop(request_id, None)

    def admitted(self, sequences: Iterable[Sequence], now: float) -> None:
        """Count each request the first time: neither its further outputs, nor its return after a preemption."""
        for sequence in sequences:
            if (arrival := self._arrivals.pop(sequence.request.id, None)) is not None:
                self.queue.add(now - arrival)

    def sampled(self, sequences: Items[Sequence], now: float) -> None:
        """A step has given each sequence a token.

        Called in every step, so the cost matters: nearly all sequences have waited since the same step, and are
        counted at once.
        """
        for before, count in Counter(map(_sampled_at, sequences)).items():
            if before is not None:
                self.inter_token.add(now - before, count)
        for sequence in sequences:
            sequence.sampled_at = now
