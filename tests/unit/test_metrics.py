"""What is counted, and what TorchServe is told of it."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import yaml

from llama_tp.engine.request import FinishReason, Request
from llama_tp.engine.sampling_params import SamplingParams
from llama_tp.engine.sequence import Sequence
from llama_tp.engine.stats import EngineStats, Histogram
from llama_tp.engine.timing import Timing
from llama_tp.serving.errors import ApiError
from llama_tp.serving.metrics import RequestMetrics, RequestRecord
from llama_tp.torchserve.metrics import Publisher, Sample, constants, label, samples
from tests.exposition import queries, used_by
from tests.paths import CONFIGS

DECLARED = yaml.safe_load((CONFIGS / "metrics.yaml").read_text())["model_metrics"]
DIMENSIONS = {
    metric["name"]: metric["dimensions"]
    for metrics in DECLARED.values()
    for metric in metrics
    if metric["name"].startswith("llama_tp_")
}


class Clock:
    """Shows the time that it is told."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Metrics:
    """What TorchServe's frontend makes of its lines: series by name and dimensions. Remembers the updates."""

    def __init__(self, names=DIMENSIONS):
        self.values = {}
        self.updates = []
        self.declared = {name: SimpleNamespace(add_or_update=self._update(name)) for name in names}

    def _update(self, name):
        is_counter = name not in {metric["name"] for metric in DECLARED["gauge"]}

        def update(value, dimensions):
            key = (name, *dimensions)
            assert not is_counter or value >= 0
            self.values[key] = self.values.get(key, 0) * is_counter + value
            self.updates.append(key)

        return update


def request_of(request_id="a", n=1):
    return Request(request_id, (1, 2, 3), SamplingParams(max_new_tokens=4, n=n))


def engine_stats(**changes):
    empty = Histogram((0.1, 1.0)).snapshot()
    stats = EngineStats(
        running=0,
        waiting=0,
        pages_used=0,
        pages_total=8,
        preemptions=0,
        prompt_tokens=0,
        prefix_hit_tokens=0,
        tokens_out=0,
        drafted_tokens=0,
        accepted_tokens=0,
        step_seconds=empty,
        queue_seconds=empty,
        inter_token_seconds=empty,
    )
    return replace(stats, **changes)


# --- histograms


def test_a_duration_is_counted_below_the_first_bound_that_it_does_not_exceed():
    histogram = Histogram((0.1, 1.0))
    for seconds in (0.05, 0.1, 0.11, 1.0, 7.0):
        histogram.add(seconds)
    histogram.add(0.5, count=3)
    shown = histogram.snapshot()
    assert shown.bounds == (0.1, 1.0)
    assert shown.counts == (2, 5, 1)
    assert shown.total == pytest.approx(9.76)


# --- the engine's times


def test_queue_time_ends_when_a_request_is_first_admitted_and_is_counted_once():
    timing = Timing()
    first, second = (Sequence(request_of(n=2), [1, 2, 3], index) for index in range(2))
    timing.arrived("a", 10.0)
    timing.admitted([first], 13.0)
    timing.admitted([second], 20.0)  # its other output
    timing.admitted([first], 30.0)  # after a preemption
    assert timing.queue.snapshot().total == 3.0
    assert sum(timing.queue.snapshot().counts) == 1


def test_a_request_that_ends_in_the_queue_has_no_queue_time_even_if_its_id_comes_again():
    timing = Timing()
    timing.arrived("a", 10.0)
    timing.left("a")
    timing.admitted([Sequence(request_of(), [1])], 13.0)
    assert sum(timing.queue.snapshot().counts) == 0


def test_inter_token_time_is_measured_for_each_token_but_the_first_of_an_output():
    timing = Timing()
    one, two = (Sequence(request_of(request_id), [1]) for request_id in "ab")
    timing.sampled([one], 1.0)
    timing.sampled([one, two], 1.5)  # 0.5, and the first token of two
    timing.sampled([two], 1.75)  # 0.25: one was preempted
    timing.sampled([one, two], 3.5)  # 2.0 and 1.75
    shown = timing.inter_token.snapshot()
    assert sum(shown.counts) == 4
    assert shown.total == 0.5 + 0.25 + 2.0 + 1.75


# --- the service's counters


def test_a_request_is_counted_from_its_opening_to_its_last_reply():
    clock = Clock()
    metrics = RequestMetrics(clock)
    record = RequestRecord(metrics, 7, clock())
    assert metrics.snapshot().prompt_tokens == 0, "it may yet be refused by the engine"
    clock.now += 0.25
    record.token()
    clock.now += 1.5
    record.token()
    record.output_ended(FinishReason.LENGTH)
    record.answered()
    shown = metrics.snapshot()
    assert (shown.prompt_tokens, shown.generation_tokens) == (7, 2)
    assert shown.first_token_seconds.total == 0.25
    assert shown.request_seconds.total == 1.75
    assert {reason: count for reason, count in shown.finished.items() if count} == {FinishReason.LENGTH: 1}
    assert set(shown.finished) == set(FinishReason)


def test_errors_are_counted_by_status_and_code_and_text_cannot_become_a_code():
    metrics = RequestMetrics()
    for error in (
        ApiError(400, "invalid_json", "x"),
        ApiError(400, "invalid_json", "y"),
        ApiError(404, "no/such:x", ""),
    ):
        metrics.failed(error)
    errors = metrics.snapshot().errors
    assert {key: count for key, count in errors.items() if count} == {(400, "invalid_json"): 2, (404, "other"): 1}


def test_errors_that_alerts_ask_for_are_counted_from_0_on():
    assert RequestMetrics().snapshot().errors == {
        (429, "queue_full"): 0,
        (500, "internal_error"): 0,
        (500, "nan_logits"): 0,
    }


# --- publishing


def test_every_series_is_published_at_first_then_only_what_has_changed():
    metrics = Metrics()
    publisher = Publisher(metrics.declared, "llama")
    requests = RequestMetrics()
    publisher.publish(samples(engine_stats(), requests.snapshot()))
    assert {key[0] for key in metrics.updates} == set(DIMENSIONS) - {
        "llama_tp_info",
        "llama_tp_model_load_time_seconds",
        "llama_tp_start_time_seconds",
    }
    assert set(metrics.values.values()) == {0}
    metrics.updates.clear()
    publisher.publish(samples(engine_stats(), requests.snapshot()))
    assert metrics.updates == []
    publisher.publish(samples(engine_stats(running=2), requests.snapshot()))
    assert metrics.updates == [("llama_tp_num_requests_running", "llama")]


def test_counters_go_on_where_they_were_when_the_leader_is_restarted():
    metrics = Metrics()
    for _ in range(2):
        publisher = Publisher(metrics.declared, "llama")
        for count in (0, 5, 5, 9):
            publisher.publish([Sample("llama_tp_generation_tokens_total", count)])
    assert metrics.values == {("llama_tp_generation_tokens_total", "llama"): 18}


def test_a_gauge_shows_its_last_value():
    metrics = Metrics()
    publisher = Publisher(metrics.declared, "llama")
    for pages in (4, 2, 6):
        publisher.publish(samples(engine_stats(pages_used=pages), RequestMetrics().snapshot()))
    assert metrics.values["llama_tp_kv_cache_usage_perc", "llama"] == 0.75


def test_a_histogram_becomes_cumulative_buckets_with_a_sum_and_a_count():
    histogram = Histogram((0.1, 1.0))
    metrics = Metrics()
    publisher = Publisher(metrics.declared, "llama")
    name = "llama_tp_step_duration_seconds"
    for seconds in (0.05, 0.5, 0.5, 2.0):
        histogram.add(seconds)
        publisher.publish(samples(engine_stats(step_seconds=histogram.snapshot()), RequestMetrics().snapshot()))
    buckets = {bound: metrics.values[f"{name}_bucket", "llama", bound] for bound in ("0.1", "1", "+Inf")}
    assert buckets == {"0.1": 1, "1": 3, "+Inf": 4}
    assert metrics.values[f"{name}_count", "llama"] == 4
    assert metrics.values[f"{name}_sum", "llama"] == pytest.approx(3.05)


def test_no_scrape_sees_a_bucket_above_a_larger_one():
    """TorchServe may be scraped between any two lines."""
    histogram = Histogram((0.1, 1.0))
    metrics = Metrics()
    publisher = Publisher(metrics.declared, "llama")
    for _ in range(3):
        histogram.add(0.05)
        before = len(metrics.updates)
        publisher.publish(samples(engine_stats(step_seconds=histogram.snapshot()), RequestMetrics().snapshot()))
        order = [key[2] for key in metrics.updates[before:] if key[0] == "llama_tp_step_duration_seconds_bucket"]
        assert order == ["+Inf", "1", "0.1"]


def test_what_the_operators_file_does_not_declare_is_not_published():
    metrics = Metrics(names=["llama_tp_num_requests_running"])
    Publisher(metrics.declared, "llama").publish(samples(engine_stats(), RequestMetrics().snapshot()))
    assert metrics.updates == [("llama_tp_num_requests_running", "llama")]


@pytest.mark.parametrize(
    ("text", "expected"), [("llama-3.1_8b", "llama-3.1_8b"), ("a:b,c|d#é", "a_b_c_d__"), ("", "unknown")]
)
def test_labels_hold_nothing_that_ends_a_line_of_torchserve(text, expected):
    assert label(text) == expected


def test_the_labels_are_those_that_the_file_declares():
    """TorchServe drops, with an error in its log, a sample with more or fewer."""
    requests = RequestMetrics()
    engine = SimpleNamespace(
        comm=SimpleNamespace(size=2), runner=SimpleNamespace(dtype="torch.bfloat16"), quantization=("int4", "int8")
    )
    context = SimpleNamespace(manifest={"model": {"modelVersion": "1.0"}})
    found = [*constants(SimpleNamespace(engine=engine), context, 4.5), *samples(engine_stats(), requests.snapshot())]
    assert {sample.name for sample in found} == set(DIMENSIONS)
    for sample in found:
        assert len(sample.labels) + 1 == len(DIMENSIONS[sample.name]), sample
    counters = {metric["name"] for metric in DECLARED["counter"]}
    assert {sample.name for sample in found if sample.is_counter} == counters
    (info,) = (sample for sample in found if sample.name == "llama_tp_info")
    named = dict(zip(DIMENSIONS["llama_tp_info"][1:], info.labels, strict=True))
    assert (named["model_version"], named["tp_size"], named["dtype"]) == ("1.0", "2", "bfloat16")
    assert named["quantization"] == "int4+int8"


JAVA = re.compile(
    r"\s*([\w\s]+)\.([\w\s]+):([0-9\-,.e]+)\|#([^|]*)(\|#type:([^|,]+))?\|#hostname:([^,]+),([^,]+)(,(.*))?", re.ASCII
)
"""Metric.java of TorchServe 0.12.0, behind [METRICS]."""


@pytest.mark.parametrize("seconds", [1e-9, 0.1 + 0.2, 1e15, 12345.678901234567])
def test_torchserves_own_classes_read_our_file_and_its_frontend_reads_their_lines(seconds, caplog):
    cache = pytest.importorskip("ts.metrics.metric_cache_yaml_impl").MetricsCacheYamlImpl(str(CONFIGS / "metrics.yaml"))
    cache.initialize_cache()
    declared = {name: metric for metrics in cache.cache.values() for name, metric in metrics.items()}
    histogram = Histogram((0.1, 1.0))
    histogram.add(seconds)
    with caplog.at_level(logging.INFO, "ts.metrics.caching_metric"):
        Publisher(declared, "llama").publish(
            samples(engine_stats(step_seconds=histogram.snapshot()), RequestMetrics().snapshot())
        )
    lines = [record.getMessage() for record in caplog.records if record.name == "ts.metrics.caching_metric"]
    assert len(lines) > 60
    for line in lines:
        start, metrics, rest = line.partition("[METRICS]")
        found = JAVA.fullmatch(rest)
        assert (start, metrics) == ("", "[METRICS]")
        assert found, line
        assert float(found[3]) >= 0
        names = [pair.split(":")[0] for pair in found[4].split(",") if len(pair.split(":")) == 2]
        assert names == DIMENSIONS[found[1]], line


# --- dashboard and alerts


def test_queries_ask_only_for_what_is_declared():
    """That it is there in fact, tests/e2e/test_metrics.py asks a real server."""
    known = {name: {*dimensions, "Hostname", "instance"} for name, dimensions in DIMENSIONS.items()}
    all_queries = list(queries())
    assert len(all_queries) > 30
    for where, query in all_queries:
        for name, labels in used_by(query):
            if name != "Requests5XX":  # TorchServe's own
                assert labels <= known[name], f"{where}: {query}"


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("absent(llama_tp_info)", [("llama_tp_info", set())]),
        ('rate(a{b="c", d=~"e{1}"}[5m]) > 0', [("a", {"b", "d"})]),
        ("sum by (x, y) (a) / sum by (x) (b)", [("a", {"x", "y"}), ("b", {"x", "y"})]),
    ],
)
def test_the_metrics_and_labels_of_a_query_are_found(query, expected):
    assert used_by(query) == expected


def test_every_metric_is_described():
    page = (CONFIGS.parent / "docs" / "metrics.md").read_text()
    for name in DIMENSIONS:
        assert f"`{re.sub(r'_(bucket|sum|count)$', '', name)}`" in page, name
