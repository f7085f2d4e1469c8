"""The load benchmark: a reproducible workload, figures as `vllm bench serve` defines them, every answer complete."""

from __future__ import annotations

import json
import math
import statistics
from itertools import pairwise

import pytest

from llama_tp.bench import engine_load as offline
from llama_tp.bench import workload as load_module
from llama_tp.bench.api import APIS, parse_apis
from llama_tp.bench.client import ResponseParser, Target, request_bytes
from llama_tp.bench.serve import Setup, model_config, where_it_goes
from llama_tp.bench.workload import (
    NEW_TOKENS,
    PROMPT_TOKENS,
    Job,
    Load,
    Recorder,
    Slo,
    Trace,
    parse_rate,
    summarize,
    table,
    warm_up,
    with_other_prompts,
    workload,
)
from llama_tp.engine.request import FinishReason
from llama_tp.engine.sampling_params import KNOBS
from llama_tp.serving.dialects.base import Accepted
from llama_tp.serving.errors import ApiError
from llama_tp.serving.generation import OutputDelta, RequestDefaults, Usage
from llama_tp.serving.routes import Routes
from llama_tp.torchserve.config import ModelConfig
from tests.tiny_model import MODELS, engine_of, random_model
from tests.unit.text_fixtures import tiny as tiny_tokenizer

DEFAULTS = RequestDefaults(
    mode="chat", max_new_tokens=9, seed=None, sampling={knob.name: knob.default for knob in KNOBS}
)
DIALECTS = Routes.of(DEFAULTS, ("m",), max_seq_len=2048).dialects
SHAPE = {"vocab_size": 1000, "max_seq_len": 2048}


def test_a_workload_is_the_same_for_the_same_seed_only():
    load = Load(requests=50, rate=5.0, seed=3)
    assert workload(load, **SHAPE) == workload(load, **SHAPE)
    assert workload(load, **SHAPE) != workload(Load(requests=50, rate=5.0, seed=4), **SHAPE)


def test_lengths_are_within_their_limits_and_short_ones_are_common():
    jobs = workload(Load(requests=2000), **SHAPE)
    for lengths, (least, most) in (
        ([len(job.prompt) for job in jobs], PROMPT_TOKENS),
        ([job.new for job in jobs], NEW_TOKENS),
    ):
        assert least <= min(lengths) < 1.1 * least
        assert 0.9 * most < max(lengths) <= most
        # half of a log-uniform draw lies below the geometric mean, here 64 and 32
        assert statistics.median(lengths) == pytest.approx(math.sqrt(least * most), rel=0.1)
    assert all(0 <= token < 1000 for job in jobs for token in job.prompt)


@pytest.mark.parametrize("max_seq_len", [2, 10, 40, 200])
def test_a_short_context_clips_prompts_and_answers(max_seq_len):
    jobs = workload(Load(requests=200), vocab_size=10, max_seq_len=max_seq_len)
    assert all(job.prompt and job.new >= 1 and len(job.prompt) + job.new <= max_seq_len for job in jobs)


def test_arrivals_are_a_poisson_process_of_the_rate():
    arrivals = [job.arrival_s for job in workload(Load(requests=4000, rate=8.0), **SHAPE)]
    gaps = [late - early for early, late in pairwise(arrivals)]
    assert min(gaps) >= 0
    assert statistics.mean(gaps) == pytest.approx(1 / 8, rel=0.05)
    assert statistics.stdev(gaps) == pytest.approx(1 / 8, rel=0.1)  # exponential: as its mean


def test_without_a_rate_all_arrive_at_once():
    assert {job.arrival_s for job in workload(Load(requests=9), **SHAPE)} == {0.0}
    assert parse_rate("inf") == parse_rate(math.inf) == parse_rate(0) == 0
    assert parse_rate("2.5") == parse_rate(2.5) == 2.5


def test_a_variant_of_a_workload_has_the_same_lengths_and_other_prompts():
    jobs = workload(Load(requests=16), **SHAPE)
    others = with_other_prompts(jobs, 1, vocab_size=SHAPE["vocab_size"])
    assert with_other_prompts(jobs, 0, vocab_size=SHAPE["vocab_size"]) == jobs
    for job, other in zip(jobs, others, strict=True):
        assert (job.arrival_s, job.new, len(job.prompt)) == (other.arrival_s, other.new, len(other.prompt))
        assert all(one != two and two < SHAPE["vocab_size"] for one, two in zip(job.prompt, other.prompt, strict=True))


def test_warming_up_leaves_nothing_of_the_workload_in_a_prefix_cache():
    prompts = {job.prompt for job in workload(Load(requests=16), **SHAPE)}
    warming = warm_up(16, **SHAPE)
    assert not prompts & {job.prompt for job in warming}
    assert max(job.new for job in warming) <= 8


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"requests": 0}, "requests=0"),
        ({"requests": 1.5}, "requests=1.5"),
        ({"rate": -1.0}, "rate=-1.0"),
        ({"rate": math.nan}, "rate=nan"),
        ({"concurrency": -1}, "concurrency=-1"),
        ({"seed": "a"}, "seed='a'"),
    ],
)
def test_a_load_that_makes_no_sense_is_refused(wrong, words):
    with pytest.raises(ValueError, match=words):
        Load(**wrong)


@pytest.mark.parametrize("rate", ["fast", None, [1]])
def test_a_rate_that_is_no_number_is_refused(rate):
    with pytest.raises(ValueError, match="rate="):
        parse_rate(rate)


def test_the_figures_are_those_that_a_hand_computes():
    jobs = [Job(0.0, (1,) * 10, 3), Job(1.0, (1,) * 20, 1), Job(2.0, (1,) * 30, 5)]
    traces = [
        Trace(0.0, [0.5, 0.6, 0.8], 3),  # TTFT 500, gaps 100 and 200, TPOT 150, E2EL 800
        Trace(1.0, [1.2], 1),  # TTFT 200, E2EL 200, no TPOT
        Trace(2.0, [3.5, 4.0], 5),  # TTFT 1500; four tokens came in one chunk: a gap of 500, TPOT 125, E2EL 2000
    ]
    figures = summarize(jobs, traces, Slo(ttft_ms=1000, tpot_ms=140))
    expected = {
        "completed": 3,
        "duration": 4.0,
        "total_input_tokens": 60,
        "total_output_tokens": 9,
        "request_throughput": 0.75,
        "output_throughput": 2.25,
        "total_token_throughput": 17.25,
        "request_goodput": 0.25,  # the first is too slow in its tokens, the last in its first one
        "good_share": 1 / 3,
        "mean_ttft_ms": 2200 / 3,
        "median_ttft_ms": 500,
        "p99_ttft_ms": 500 + 0.98 * 1000,  # rank 0.99 * 2 of [200, 500, 1500]
        "mean_tpot_ms": 137.5,
        "median_tpot_ms": 137.5,
        "p99_tpot_ms": 125 + 0.99 * 25,
        "mean_itl_ms": 800 / 3,
        "median_itl_ms": 200,
        "p99_itl_ms": 200 + 0.98 * 300,
        "mean_e2el_ms": 1000,
        "median_e2el_ms": 800,
        "p99_e2el_ms": 800 + 0.98 * 1200,
    }
    assert figures == pytest.approx(expected)
    assert json.loads(json.dumps(figures)) == figures


def test_a_request_at_its_limits_is_good():
    jobs, traces = [Job(0.0, (1,), 2)], [Trace(0.0, [0.5, 0.75], 2)]
    assert summarize(jobs, traces, Slo(500, 250))["good_share"] == 1
    assert summarize(jobs, traces, Slo(499, 250))["good_share"] == 0
    assert summarize(jobs, traces, Slo(500, 249))["good_share"] == 0


def test_a_load_of_single_tokens_has_no_gaps_to_report():
    figures = summarize([Job(0.0, (1,), 1)], [Trace(0.0, [0.5], 1)], Slo())
    assert figures["mean_tpot_ms"] == figures["p99_itl_ms"] == 0


def test_the_table_has_a_column_for_each_contender():
    figures = summarize([Job(0.0, (1,), 1)], [Trace(0.0, [0.5], 1)], Slo())
    head, *rows = table({"offline": figures, "served": figures}).splitlines()
    assert head.split() == ["offline", "served"]
    assert len(rows) == len(figures)
    assert "P99 TTFT (ms)                           500.00      500.00" in rows


@pytest.fixture
def tiny():
    return engine_of(random_model(MODELS["gqa"]), max_batch_size=4)


@pytest.mark.parametrize("load", [Load(requests=12), Load(requests=12, rate=200.0), Load(requests=12, concurrency=2)])
def test_every_request_gets_exactly_its_tokens(tiny, load):
    jobs = workload(load, vocab_size=128, max_seq_len=128)
    traces = offline.drive(tiny, jobs, concurrency=load.concurrency).traces
    assert [trace.num_tokens for trace in traces] == [job.new for job in jobs]
    for job, trace in zip(jobs, traces, strict=True):
        assert trace.start_s >= job.arrival_s
        assert trace.chunks_s == sorted(trace.chunks_s)
        assert trace.chunks_s[0] > trace.start_s
    assert tiny.num_requests == 0


def test_what_is_held_back_counts_from_when_it_is_let_go(tiny):
    jobs = workload(Load(requests=6), vocab_size=128, max_seq_len=128)
    traces = offline.drive(tiny, jobs, concurrency=1).traces
    ends = [trace.chunks_s[-1] for trace in traces]
    assert all(trace.start_s >= end for end, trace in zip(ends, traces[1:], strict=False))


def test_the_engine_waits_for_what_arrives_late(tiny, monkeypatch):
    """By a clock that moves only while the engine waits."""
    waits = []
    monkeypatch.setattr(load_module, "perf_counter", lambda: sum(waits))
    monkeypatch.setattr(offline, "sleep", waits.append)
    jobs = [Job(0.0, (1, 2), 2), Job(0.3, (3,), 2)]
    first, second = offline.drive(tiny, jobs).traces
    assert waits == [0.3]
    assert (first.start_s, first.chunks_s) == (0, [0, 0])
    assert (second.start_s, second.chunks_s) == (0.3, [0.3, 0.3])


CHUNKED = (
    b"HTTP/1.1 200 OK\r\nContent-Type: application/jsonl\r\nTransfer-Encoding: chunked\r\n\r\n"
    b'D\r\n{"ids": [1]}\n\r\n1a;note=x\r\n{"ids": [22, 23]}\n{"ids": \r\n4\r\n[]}\n\r\n0\r\nTrailer: 1\r\n\r\n'
)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_a_chunked_response_is_read_however_it_is_cut(size):
    parser, body = ResponseParser(), b""
    for at in range(0, len(CHUNKED), size):
        assert not parser.is_complete
        body += parser.feed(CHUNKED[at : at + size])
    assert (parser.status, parser.is_complete) == (200, True)
    assert [json.loads(line)["ids"] for line in body.splitlines()] == [[1], [22, 23], []]


@pytest.mark.parametrize("size", [1, 5, 1000])
@pytest.mark.parametrize("body", [b"", b'{"error": {}}\n'])
def test_a_response_of_a_given_length_is_read(body, size):
    response = b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: %d\r\n\r\n" % len(body) + body
    parser = ResponseParser()
    got = b"".join(parser.feed(response[at : at + size]) for at in range(0, len(response), size))
    assert (parser.status, parser.is_complete, got) == (503, True, body)


@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
@pytest.mark.parametrize("size", [1, 5, 1000])
def test_a_response_without_a_length_ends_with_the_connection(version, size):
    """RFC 9112, section 6.3."""
    response = b"HTTP/" + version + b" 200 OK\r\ncontent-type: text/event-stream\r\n\r\ndata: 1\r\n\r\n"
    parser = ResponseParser()
    got = b"".join(parser.feed(response[at : at + size]) for at in range(0, len(response), size))
    assert not parser.is_complete
    parser.end()
    assert (parser.status, parser.is_complete, got) == (200, True, b"data: 1\r\n\r\n")


@pytest.mark.parametrize(
    "response", [b"", CHUNKED[:-2], b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\n{}"]
)
def test_a_response_that_the_server_breaks_off_is_no_response(response):
    parser = ResponseParser()
    parser.feed(response)
    with pytest.raises(ConnectionError, match="closed the connection before the response was complete"):
        parser.end()


@pytest.mark.parametrize(
    "response", [b"SSH-2.0\r\n\r\n", b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nxyz\r\n"]
)
def test_what_is_no_response_is_refused(response):
    with pytest.raises(ValueError, match=r".+"):
        ResponseParser().feed(response)


@pytest.mark.parametrize(
    ("api", "path", "own"),
    [
        ("native", b"/predictions/m", {"max_new_tokens": 7}),
        ("openai", b"/predictions/m/1.0/v1/completions", {"max_tokens": 7, "return_token_ids": True}),
    ],
)
def test_a_request_is_whole_and_greedy(api, path, own):
    head, _, body = request_bytes(Job(0.0, (5, 6), 7), Target(port=8080, path="/predictions/m"), APIS[api]).partition(
        b"\r\n\r\n"
    )
    assert head.startswith(b"POST " + path + b" HTTP/1.1\r\n")
    assert b"Content-Length: %d" % len(body) in head
    assert json.loads(body) == {"prompt": [5, 6], **own, "temperature": 0, "stream": True, "ignore_eos": True}
    dialect = DIALECTS[APIS[api].route.removeprefix("/1.0/")]
    assert dialect.parse(body).sampling.max_new_tokens == 7


@pytest.mark.parametrize("api", APIS.values(), ids=lambda api: api.name)
def test_the_tokens_of_a_stream_are_counted_in_each_api(api):
    job = Job(0.0, (5, 6), 3)
    dialect = DIALECTS[api.route.removeprefix("/1.0/")]
    request = dialect.parse(json.dumps(api.fields(job)).encode())
    replies = dialect.replies(Accepted("id", request, [job.prompt]), tiny_tokenizer("sentencepiece"), 16)
    stream = replies.chunk([delta([7, 8])], None)
    stream += replies.chunk([delta([]), delta([9], FinishReason.LENGTH)], Usage(2, 3))
    answer = api.answer()
    assert [count for line in stream.splitlines() if (count := answer.read(line))] == [2, 1]
    assert answer.complete(3) == 3
    with pytest.raises(OSError, match="an answer has 3 of 4 tokens"):
        answer.complete(4)
    with pytest.raises(OSError, match="nan_logits"):
        answer.read(replies.error(ApiError(500, "nan_logits", "no number")).splitlines()[0])


def delta(ids, finish_reason=None):
    return OutputDelta(index=0, text="a", ids=ids, logprobs=None, finish_reason=finish_reason, error=None)


def test_apis_are_chosen_by_name():
    assert [api.name for api in parse_apis("openai")] == ["openai"]
    assert [api.name for api in parse_apis(("native", "openai"))] == ["native", "openai"]
    for wrong in ("grpc", "", (), "native,grpc", 5):
        with pytest.raises(ValueError, match="must be one or several of native, openai"):
            parse_apis(wrong)


def test_both_sides_are_configured_alike():
    sizes = {"max_batch_size": 5, "max_batched_tokens": 64, "threads": 2}
    setup = Setup(checkpoint="c", tokenizer="x/tokenizer.model", **sizes, compile=False)
    config = ModelConfig.of(model_config(setup, Load(requests=300), 384))
    assert (config.batchSize, config.handler.max_batch_size, config.handler.max_batched_tokens) == (5, 5, 64)
    assert (config.handler.max_seq_len, config.torchrun.OMP_NUMBER_THREADS) == (384, 2)
    assert config.handler.compile is False
    assert config.jobQueueSize >= 300


def test_what_computes_beside_the_engine_is_counted_for_each_token():
    latencies = {f"median_{name}_ms": 10.0 for name in ("ttft", "itl", "tpot")}
    cpu = {"frontend": 1.0, "ranks": 9.0, "main_threads": 0.5, "client": 0.4, "agent": 0.1, "idle": 0.0}
    served = {name: value + 2 for name, value in latencies.items()} | {f"{key}_cpu_s": cpu[key] for key in cpu}
    text = where_it_goes({**latencies, "leader_cpu_s": 8.0}, {**served, "duration": 10.0, "total_output_tokens": 1000})
    assert "median ITL +2.00 ms" in text
    assert "engine threads 8.50" in text
    assert "2000 us per token" in text


def test_a_recorder_counts_from_its_beginning():
    recorder = Recorder(2)
    recorder.tokens(1, 3)
    assert recorder.traces[1].num_tokens == 3
    assert recorder.num_chunks == 1
    assert 0 <= recorder.traces[1].chunks_s[0] <= recorder.now() < 60
