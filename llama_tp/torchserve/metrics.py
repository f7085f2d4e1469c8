"""Publishes the leader's metrics on TorchServe's Prometheus port.

TorchServe reads `[METRICS]` lines from the worker's stdout: an increment of a counter or a new value of a gauge, for a
name that `configs/metrics.yaml` declares. Its own histograms have fixed buckets up to 10 s, and take a line for every
observation. So a histogram is published as Prometheus stores it, as counters `_bucket`, `_sum` and `_count`, and a
thread writes once a second what has changed. Describes 0.12.0: WorkerLifeCycle.java, Metric.java.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Protocol

import llama_tp
from llama_tp.engine.stats import EngineStats, HistogramSnapshot
from llama_tp.serving.metrics import RequestStats

if TYPE_CHECKING:
    from llama_tp.serving.service import LlamaService  # needs torch

PERIOD_S = 1.0
"""How often changes are published."""


@dataclass(frozen=True, slots=True)
class Sample:
    """The current value of one time series."""

    name: str
    value: float
    """Counters: since the start of the leader."""
    labels: tuple[str, ...] = ()
    """Values of the metric's dimensions behind model_name."""
    is_counter: bool = True


class Metric(Protocol):
    """TorchServe's `CachingMetric`."""

    def add_or_update(self, value: float, dimension_values: list[str]) -> None:
        """Add to a counter, or set a gauge."""
        ...


class Publisher:
    """Tells TorchServe what has changed. A counter continues in the frontend when the ranks are restarted."""

    def __init__(self, declared: Mapping[str, Metric], model_name: str) -> None:
        """declared: by name. Other metrics are not published."""
        self._declared = declared
        self._model_name = label(model_name)
        self._published: dict[tuple[str, ...], float] = {}

    def publish(self, samples: Iterable[Sample]) -> None:
        """Publish the samples whose value has changed, in their order; every series once at first, even if it is 0."""
        for sample in samples:
            key = (sample.name, *sample.labels)
            before = self._published.get(key)
            if sample.value == before or (metric := self._declared.get(sample.name)) is None:
                continue
            self._published[key] = sample.value
            value = sample.value - (before or 0) if sample.is_counter else sample.value
            metric.add_or_update(value, [self._model_name, *sample.labels])


def start_publishing(service: LlamaService, context: Any, load_s: float) -> None:
    """Publish a service's metrics from now on, in a thread of its own: no request has to come in for that.

    context: TorchServe's. load_s: how long the service took to start.
    """
    declared = {name: metric for metrics in context.metrics.cache.values() for name, metric in metrics.items()}
    publisher = Publisher(declared, context.model_name)
    constant = list(constants(service, context, load_s))

    def run() -> None:
        publisher.publish(constant)
        while True:
            publisher.publish(samples(service.engine.stats(), service.metrics.snapshot()))
            time.sleep(PERIOD_S)

    threading.Thread(target=run, name="metrics", daemon=True).start()


def constants(service: LlamaService, context: Any, load_s: float) -> Iterator[Sample]:
    """What does not change while the leader lives."""
    engine = service.engine
    model = (context.manifest or {}).get("model", {})
    yield _gauge("llama_tp_model_load_time_seconds", load_s)
    yield _gauge("llama_tp_start_time_seconds", time.time())
    yield _gauge(
        "llama_tp_info",
        1,
        label(str(model.get("modelVersion", ""))),
        llama_tp.__version__,
        str(engine.comm.size),
        str(engine.runner.dtype).removeprefix("torch."),
        label("+".join(engine.quantization) or "none"),
    )


def samples(engine: EngineStats, requests: RequestStats) -> Iterator[Sample]:
    """All time series, with vLLM's names behind our prefix."""
    yield _gauge("llama_tp_num_requests_running", engine.running)
    yield _gauge("llama_tp_num_requests_waiting", engine.waiting)
    yield _gauge("llama_tp_kv_cache_usage_perc", engine.pages_used / engine.pages_total)
    yield Sample("llama_tp_prompt_tokens_total", requests.prompt_tokens)
    yield Sample("llama_tp_generation_tokens_total", requests.generation_tokens)
    yield Sample("llama_tp_prefix_cache_queries_total", engine.prompt_tokens)
    yield Sample("llama_tp_prefix_cache_hits_total", engine.prefix_hit_tokens)
    yield Sample("llama_tp_num_preemptions_total", engine.preemptions)
    yield Sample("llama_tp_spec_decode_num_draft_tokens_total", engine.drafted_tokens)
    yield Sample("llama_tp_spec_decode_num_accepted_tokens_total", engine.accepted_tokens)
    for reason, count in requests.finished.items():
        yield Sample("llama_tp_request_success_total", count, (reason.value,))
    for (status, code), count in requests.errors.items():
        yield Sample("llama_tp_request_errors_total", count, (str(status), code))
    yield from _histogram("llama_tp_time_to_first_token_seconds", requests.first_token_seconds)
    yield from _histogram("llama_tp_inter_token_latency_seconds", engine.inter_token_seconds)
    yield from _histogram("llama_tp_e2e_request_latency_seconds", requests.request_seconds)
    yield from _histogram("llama_tp_request_queue_time_seconds", engine.queue_seconds)
    yield from _histogram("llama_tp_step_duration_seconds", engine.step_seconds)


def label(text: str) -> str:
    """Text as a label's value. TorchServe's lines cannot escape separators, and lose labels with empty values."""
    return re.sub(r"[^\w.+-]", "_", text, flags=re.ASCII) or "unknown"


def _gauge(name: str, value: float, *labels: str) -> Sample:
    return Sample(name, value, labels, is_counter=False)


def _histogram(name: str, histogram: HistogramSnapshot) -> Iterator[Sample]:
    """The series of a Prometheus histogram: cumulative buckets, sum and count.

    The largest bucket comes first, so that no scrape in between sees one that is smaller than the next smaller one.
    """
    bounds = [f"{bound:g}" for bound in histogram.bounds] + ["+Inf"]
    cumulative = list(accumulate(histogram.counts))
    yield Sample(f"{name}_count", cumulative[-1])
    yield Sample(f"{name}_sum", histogram.total)
    for bound, count in zip(reversed(bounds), reversed(cumulative), strict=True):
        yield Sample(f"{name}_bucket", count, (bound,))
