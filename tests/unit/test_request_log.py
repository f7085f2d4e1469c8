"""The line for each request: what it says, what it does not say, and what it costs."""

from __future__ import annotations

import io
import logging
import time

import pytest

from llama_tp.serving.errors import ApiError
from llama_tp.serving.generation import Usage
from llama_tp.serving.metrics import RequestMetrics, RequestRecord
from llama_tp.serving.request_log import log_ended, log_short


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def record():
    clock = Clock()
    record = RequestRecord(RequestMetrics(clock), 37, clock())
    record.clock = clock
    return record


@pytest.fixture
def lines(caplog):
    caplog.set_level(logging.INFO)
    return lambda: [one.getMessage() for one in caplog.records]


def test_an_answered_request_has_its_tokens_and_its_speed(record, lines):
    record.clock.now += 0.25
    record.token()
    record.clock.now += 0.5
    record.token()
    log_ended("id-1", "v1/completions", 200, "stop", Usage(37, 11), record)
    assert lines() == [
        "request id-1 v1/completions 200 stop: 37 tokens in, 11 out, TTFT 0.250 s, 20.0 tokens/s, total 0.750 s"
    ]


def test_without_tokens_there_is_no_speed(record, lines):
    record.clock.now += 2
    log_ended("id-1", "", 499, "cancelled", Usage(37, 0), record)
    record.token()
    log_ended("id-2", "", 200, "length", Usage(37, 1), record)
    log_short("id-3", "v1/models", 200, "ok")
    log_short("id-4", "", 400, "invalid_json")
    assert lines() == [
        "request id-1 predictions 499 cancelled: 37 tokens in, 0 out, total 2.000 s",
        "request id-2 predictions 200 length: 37 tokens in, 1 out, TTFT 2.000 s, total 2.000 s",
        "request id-3 v1/models 200 ok",
        "request id-4 predictions 400 invalid_json",
    ]


def test_a_line_costs_less_than_a_thousandth_of_a_step(record):
    """As TorchServe's worker sets logging up, but into memory. Measured: 7 us on a busy machine."""
    log = logging.getLogger("llama_tp.serving.request_log")
    handler = logging.StreamHandler(io.StringIO())
    log.addHandler(handler)
    before, log.level, log.propagate = log.level, logging.INFO, False
    try:
        best = min(
            timed(lambda: log_ended("id", "v1/completions", 200, "stop", Usage(37, 11), record)) for _ in range(20)
        )
    finally:
        log.removeHandler(handler)
        log.level, log.propagate = before, True
    assert best < 100e-6


def timed(call, count=50):
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count


def test_errors_say_their_code_only(lines):
    error = ApiError(400, "invalid_value", "temperature='my secret'")
    log_short("id", "", error.status, error.code)
    assert "secret" not in lines()[0]
