"""Tells in the log how much of a model's weights is read. Whoever starts the ranks reads it there."""

from __future__ import annotations

import logging
from time import monotonic

log = logging.getLogger(__name__)

READ = "read {percent} % of the weights"
_STEP_PERCENT = 5
_QUIET_S = 2.0


class LoadProgress:
    """Logs every few percent, but not more often than every two seconds: a load that takes less is silent."""

    def __init__(self, total: int) -> None:
        """`total`: bytes of all weights that will be read."""
        self._total = total
        self._read = 0
        self._told = 0  # percent
        self._told_at = monotonic()

    def advance(self, size: int) -> None:
        """`size`: bytes that have been read since the last call."""
        self._read += size
        percent = 100 * self._read // max(1, self._total)
        if percent - self._told >= _STEP_PERCENT and monotonic() - self._told_at >= _QUIET_S:
            self._told, self._told_at = percent, monotonic()
            log.info(READ.format(percent=percent))
