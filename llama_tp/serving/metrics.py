"""Counts what happens to requests between their arrival and their last reply. Knows no exporter."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import monotonic

from llama_tp.engine.request import FinishReason
from llama_tp.engine.stats import REQUEST_BOUNDS, Histogram, HistogramSnapshot
from llama_tp.serving.errors import ApiError

_CODE = re.compile(r"[a-z0-9_]{1,64}")
_ALERTING = ((429, "queue_full"), (500, "internal_error"), (500, "nan_logits"))
"""Counted from 0 on: Prometheus sees no increase in a series that begins with its first error."""


@dataclass(frozen=True, slots=True)
class RequestStats:
    """Counters since startup."""

    prompt_tokens: int
    """Of requests whose prompt has been computed; once per request, whatever n is."""
    generation_tokens: int
    """Generated tokens of all outputs, as in the clients' usage."""
    finished: Mapping[FinishReason, int]
    """Outputs that have ended. Every reason is a key."""
    errors: Mapping[tuple[int, str], int]
    """Error replies, by status and code."""
    first_token_seconds: HistogramSnapshot
    """Per request: from its opening to its first token."""
    request_seconds: HistogramSnapshot
    """Per request that did not fail: from its opening to its last reply."""


class RequestMetrics:
    """The counters. One thread counts; others may take a snapshot at any time."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self.clock = clock
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.first_token = Histogram(REQUEST_BOUNDS)
        self.whole_request = Histogram(REQUEST_BOUNDS)
        self.finished = dict.fromkeys(FinishReason, 0)
        self._errors = dict.fromkeys(_ALERTING, 0)

    def failed(self, error: ApiError) -> None:
        """A client gets this error. Codes become labels, so nothing that looks like text is accepted."""
        key = (error.status, error.code if _CODE.fullmatch(error.code) else "other")
        self._errors[key] = self._errors.get(key, 0) + 1

    def snapshot(self) -> RequestStats:
        return RequestStats(
            prompt_tokens=self.prompt_tokens,
            generation_tokens=self.generation_tokens,
            finished=self.finished.copy(),
            errors=self._errors.copy(),
            first_token_seconds=self.first_token.snapshot(),
            request_seconds=self.whole_request.snapshot(),
        )


class RequestRecord:
    """One request's contribution to the metrics, from its opening on."""

    def __init__(self, metrics: RequestMetrics, num_prompt: int, opened: float) -> None:
        """opened: by the metrics' clock."""
        self.opened = opened
        self.first_token: float | None = None
        """When it got its first token, by the same clock."""
        self._metrics = metrics
        self._num_prompt = num_prompt

    def now(self) -> float:
        return self._metrics.clock()

    def token(self) -> None:
        """One of its outputs has got a token."""
        metrics = self._metrics
        metrics.generation_tokens += 1
        if self.first_token is None:
            self.first_token = metrics.clock()
            self.computed()
            metrics.first_token.add(self.first_token - self.opened)

    def computed(self) -> None:
        """Its prompt, or the first of several, has been computed."""
        self._metrics.prompt_tokens += self._num_prompt
        self._num_prompt = 0

    def output_ended(self, reason: FinishReason) -> None:
        self._metrics.finished[reason] += 1

    def answered(self) -> None:
        """It gets its last reply, which is not an error."""
        self._metrics.whole_request.add(self._metrics.clock() - self.opened)
