"""Fixtures that several unit tests share."""

import pytest

from llama_tp.engine import loop as loop_module


class Clock:
    """The time of every loop, for which nothing but the test moves it."""

    now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(loop_module, "time", clock)
    return clock
