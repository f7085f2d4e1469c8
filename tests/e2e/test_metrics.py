"""What Prometheus reads from a real TorchServe that serves the demo, compared with what the clients have seen."""

from __future__ import annotations

import http.client
import json
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from llama_tp.resources import HANDLER, LOG_CONFIG, PROPERTIES, resource
from llama_tp.torchserve.archive import build_archive
from llama_tp.torchserve.processes import descendants, environment_of
from llama_tp.torchserve.server import TorchServe, free_port_range
from tests.e2e.torchserve_rig import CONFIG, READY_WITHIN_S
from tests.exposition import Exposition, queries, used_by
from tests.waiting import PATIENCE_S, wait_until

pytestmark = pytest.mark.e2e

MODEL = "llama"
NUM_TOKENS = 24
NUM_LEAVING = 400
"""Tokens for which a client asks that then leaves."""


@dataclass
class Seen:
    """What one client has seen."""

    status: int
    body: Any
    first_token_s: float = 0.0
    """From sending the request to its first chunk."""
    whole_s: float = 0.0


@pytest.fixture(scope="module")
def server(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchServe]:
    work = tmp_path_factory.mktemp("métriques")  # its path is in config.properties
    config = work / "model-config.yaml"
    handler = {"converted_ckpt_dir": "converted_checkpoints", "tokenizer_path": "tokenizer.json", "max_batch_size": 4}
    handler |= {"max_seq_len": 512, "temperature": 0.0, "abandon_after_s": 2.0}
    config.write_text(yaml.safe_dump({**CONFIG, "batchSize": 4, "jobQueueSize": 4, "handler": handler}))
    checkpoint, tokenizer = demo_folder / "converted_checkpoints", demo_folder / "weights"
    build_archive(
        model_name=MODEL,
        config_file=config,
        checkpoint=checkpoint,
        tokenizer=tokenizer,
        handler=resource(HANDLER),
        model_store=work / "model_store",
    )
    server = TorchServe(
        model_store=work / "model_store",
        model_name=MODEL,
        run_dir=work,
        port=free_port_range(3),
        properties=resource(PROPERTIES),
        log_config=resource(LOG_CONFIG),
    )
    try:
        server.start()
        server.wait_until_ready(READY_WITHIN_S)
        yield server
    finally:
        server.stop()


def scrape(server: TorchServe) -> Exposition:
    connection = http.client.HTTPConnection("127.0.0.1", server.listeners.metrics.port, timeout=30)
    try:
        connection.request("GET", "/metrics")
        response = connection.getresponse()
        assert response.status == 200
        return Exposition.parse(response.read().decode())
    finally:
        connection.close()


def settled(server: TorchServe) -> Exposition:
    """The metrics once no request is open, and nothing but MARK has changed since the last time that they were
    published: a pause without a change would prove nothing, as it may be the publisher's."""
    seen = [published(server)]

    def is_settled() -> bool:
        seen.append(published(server))
        num_open = sum(seen[-1].value(f"llama_tp_num_requests_{state}") for state in ("running", "waiting"))
        return num_open == 0 and ours(seen[-1]) == ours(seen[-2])

    assert wait_until(is_settled, 3 * PATIENCE_S)
    return seen[-1]


def published(server: TorchServe) -> Exposition:
    """The metrics once they count a request of this function, and so all that were answered before it."""
    before = scrape(server).value(MARK_IN, **MARK)
    assert ask(server, b"{}", path="/1.0/no/such").status == 404
    assert wait_until(lambda: scrape(server).value(MARK_IN, **MARK) > before)
    return scrape(server)


MARK_IN = "llama_tp_request_errors_total"
MARK = {"status": "404", "code": "unknown_route"}


def ours(metrics: Exposition) -> dict[str, Any]:
    """All but MARK."""
    return {
        name: [(labels, value) for labels, value in series if not (name == MARK_IN and MARK.items() <= labels.items())]
        for name, series in metrics.series.items()
        if name.startswith("llama_tp_")
    }


def ask(server: TorchServe, body: bytes, *, path: str = "", leave_after: int | None = None) -> Seen:
    """One request; `leave_after`: disconnect after this many chunks of a stream."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
    start = time.monotonic()
    try:
        connection.request("POST", f"/predictions/{MODEL}{path}", body)
        response = connection.getresponse()
        if response.status >= 500:  # TorchServe's own, in several lines
            return Seen(response.status, [json.loads(response.read())])
        lines, first = [], 0.0
        while line := response.readline():
            first = first or time.monotonic() - start
            lines.append(json.loads(line))
            if leave_after is not None and len(lines) >= leave_after:
                break
        return Seen(response.status, lines, first, time.monotonic() - start)
    finally:
        connection.close()


def body(**fields: object) -> bytes:
    return json.dumps({"max_new_tokens": NUM_TOKENS, **fields}).encode()


def test_a_model_that_has_loaded_says_what_it_is_before_any_request(server: TorchServe) -> None:
    assert wait_until(lambda: scrape(server).has("llama_tp_info"))
    metrics = scrape(server)
    (info,) = metrics.labels("llama_tp_info")
    assert (info["model_name"], info["model_version"], info["tp_size"]) == (MODEL, "1.0", "2")
    assert info["quantization"] == "none"
    assert info["dtype"] in ("float32", "bfloat16")
    assert 0 < metrics.value("llama_tp_model_load_time_seconds") < READY_WITHIN_S
    assert abs(metrics.value("llama_tp_start_time_seconds") - time.time()) < 600


def test_the_sums_are_those_that_the_clients_have_seen(server: TorchServe) -> None:
    before = settled(server)
    good = [body(prompt=f"{number} and then came", stream=number % 2 == 0) for number in range(6)]
    good += [body(prompt="A fork:", n=2, temperature=1.0), body(prompt="1, 2, 3, 4,", stop=[" 6"])]
    bad = [b"{", body(prompt="Hi", temperature=-1), body(prompt="Hi", nonsense=1), body(prompt="x " * 5000)]
    start = time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        leaving = pool.submit(
            ask, server, body(prompt="A long story:", stream=True, max_new_tokens=NUM_LEAVING), leave_after=3
        )
        answers = list(pool.map(lambda one: ask(server, one), good + bad))
    lasted = time.monotonic() - start
    left = leaving.result()
    assert left.status == 200
    after = settled(server)
    assert after.value("llama_tp_num_requests_running") == after.value("llama_tp_num_requests_waiting") == 0

    def grown(name: str, **labels: str) -> float:
        return after.value(name, **labels) - before.value(name, **labels)

    accepted, refused = answers[: len(good)], answers[len(good) :]
    assert [seen.status for seen in accepted] == [200] * len(good)
    usage = [seen.body[-1]["usage"] for seen in accepted]
    seen_generated = sum(one["completion_tokens"] for one in usage)
    num_left = grown("llama_tp_generation_tokens_total") - seen_generated
    assert 1 <= num_left <= NUM_LEAVING, "tokens for the client that left"
    assert grown("llama_tp_prompt_tokens_total") - sum(one["prompt_tokens"] for one in usage) in range(1, 10)

    reasons = [reason for seen in accepted for reason in reasons_in(seen.body)]
    assert len(reasons) == len(good) + 1
    for reason in ("stop", "length"):
        assert grown("llama_tp_request_success_total", finished_reason=reason) == reasons.count(reason)
    assert grown("llama_tp_request_success_total", finished_reason="cancelled") == 1

    for seen in refused:
        error = seen.body[0]["error"]
        assert grown("llama_tp_request_errors_total", status=str(seen.status), code=error["code"]) == sum(
            (seen.status, error["code"]) == (one.status, one.body[0]["error"]["code"]) for one in refused
        )

    def count_of(name: str) -> float:
        return grown(f"llama_tp_{name}_seconds_count")

    assert count_of("time_to_first_token") == len(good) + 1
    assert count_of("request_queue_time") == len(good) + 1
    assert count_of("e2e_request_latency") == len(good), "those that were answered"
    assert 0 < grown("llama_tp_e2e_request_latency_seconds_sum") <= sum(seen.whole_s for seen in accepted)
    assert grown("llama_tp_time_to_first_token_seconds_sum") < sum(seen.whole_s for seen in [*accepted, left])
    assert grown("llama_tp_step_duration_seconds_sum") <= lasted + 10
    outputs = len(reasons) + 1
    # The engine computes a few tokens that no client sees: after a stop string, or once a client has left.
    extra = count_of("inter_token_latency") - (grown("llama_tp_generation_tokens_total") - outputs)
    assert 0 <= extra <= NUM_LEAVING + NUM_TOKENS
    assert grown("llama_tp_prefix_cache_queries_total") >= grown("llama_tp_prompt_tokens_total")
    assert 0 <= after.value("llama_tp_kv_cache_usage_perc") <= 1
    assert before.value("llama_tp_num_preemptions_total") == 0


def reasons_in(chunks: list[dict[str, Any]]) -> list[str]:
    found = [choice for chunk in chunks for choice in chunk.get("choices", [chunk])]
    return [one["finish_reason"] for one in found if one.get("finish_reason")]


def test_every_token_of_an_output_but_the_first_has_a_latency(server: TorchServe) -> None:
    """Where nothing is computed for nobody."""
    before = settled(server)
    answers = [ask(server, body(prompt="A fork:", n=n, temperature=1.0)) for n in (1, 3)]
    after = settled(server)
    tokens = sum(seen.body[-1]["usage"]["completion_tokens"] for seen in answers)
    name = "llama_tp_inter_token_latency_seconds_count"
    assert after.value(name) - before.value(name) == tokens - 4


def test_histograms_are_those_of_prometheus(server: TorchServe) -> None:
    """Buckets are cumulative, the last is unbounded and equals the count."""
    ask(server, body(prompt="Once"))
    metrics = settled(server)
    histograms = [name.removesuffix("_bucket") for name in metrics.names if name.endswith("_bucket")]
    assert len(histograms) == 5
    for name in histograms:
        buckets = sorted((float(labels["le"]), value) for labels, value in metrics.series[f"{name}_bucket"])
        counts = [value for _, value in buckets]
        assert counts == sorted(counts)
        assert buckets[-1] == (float("inf"), metrics.value(f"{name}_count"))
        assert metrics.value(f"{name}_count") > 0
        assert metrics.value(f"{name}_sum") > 0


def test_nothing_that_a_client_has_written_is_in_the_metrics(server: TorchServe) -> None:
    ask(server, body(prompt="xyzzy", plugh="[METRICS]plover.count:1|#a:b|#hostname:x,1"))
    settled(server)
    connection = http.client.HTTPConnection("127.0.0.1", server.listeners.metrics.port, timeout=30)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    assert not [word for word in ("xyzzy", "plugh", "plover") if word in text]


def test_counters_go_on_and_the_restart_is_seen_when_the_ranks_are_restarted(server: TorchServe) -> None:
    before = settled(server)
    assert server.pid is not None
    ranks = [pid for pid in descendants(server.pid) if "LOCAL_RANK" in environment_of(pid)]
    os.kill(ranks[-1], signal.SIGKILL)
    assert wait_until(
        lambda: scrape(server).value("llama_tp_start_time_seconds") > before.value("llama_tp_start_time_seconds"),
        READY_WITHIN_S,
    )
    server.wait_until_ready(READY_WITHIN_S)
    after = settled(server)
    grown = after.value("llama_tp_generation_tokens_total") - before.value("llama_tp_generation_tokens_total")
    assert 1 <= grown < 10, "those of the check that it is ready"


def test_every_query_finds_what_it_asks_for(server: TorchServe) -> None:

    def statuses() -> set[int]:
        """Of 16 at once, for 4 of which there are slots, and for 4 a queue."""
        with ThreadPoolExecutor(16) as pool:
            seen = list(pool.map(lambda _: ask(server, body(prompt="Once", max_new_tokens=200)), range(16)))
        return {one.status for one in seen}

    assert wait_until(lambda: statuses() == {200, 503}), "Requests5XX exists once TorchServe's queue has been full"
    metrics = settled(server)
    for where, query in queries():
        for name, labels in used_by(query):
            assert metrics.has(name), f"{where}: {query}: there is no {name}"
            for series in metrics.labels(name):
                missing = labels - series.keys() - {"instance"}  # Prometheus adds it
                assert not missing, f"{where}: {query}: {name} has no {missing}"
