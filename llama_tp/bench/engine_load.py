"""`llama-tp bench load`: requests of mixed lengths with random arrivals, through the engine alone."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import asdict
from time import perf_counter, process_time, sleep
from typing import Any

import numpy as np
import torch

from llama_tp.bench.neighbour import BESIDE, IDLE, conditions
from llama_tp.bench.report import finish
from llama_tp.bench.subject import EngineOptions, Subject, kernels_of
from llama_tp.bench.workload import (
    Job,
    Load,
    Recorder,
    Slo,
    context_of,
    describe,
    summarize,
    table,
    warm_up,
    with_other_prompts,
    workload,
)
from llama_tp.engine.engine import Engine
from llama_tp.engine.request import Request
from llama_tp.engine.sampling_params import SamplingParams
from llama_tp.parallel.launch import join

_COLUMNS = {IDLE: "offline", BESIDE: BESIDE}


def bench_load(
    subject: Subject,
    options: EngineOptions,
    load: Load,
    slo: Slo,
    *,
    max_batch_size: int,
    max_batched_tokens: int,
    neighbour: bool = False,
    plot: str | None = None,
) -> None:
    """Implements `llama-tp bench load`. Call it on every rank."""
    if not isinstance(neighbour, bool):
        raise ValueError(f"neighbour={neighbour!r} must have no value")
    args = subject.args
    config = options.config(
        max_seq_len=context_of(args.max_seq_len),
        max_batch_size=max_batch_size,
        max_batched_tokens=max(max_batched_tokens, max_batch_size),
        max_waiting=max(load.requests, max_batch_size),  # open loop: no request is rejected
    )
    shape = {"vocab_size": args.vocab_size, "max_seq_len": config.max_seq_len}
    jobs = workload(load, **shape)
    group = join(config.device, timeout_s=config.collective_timeout_s)
    engine = subject.load(config, group)
    if not engine.is_leader:
        engine.follow()
        group.comm.close()
        return
    drive(engine, warm_up(max_batch_size, **shape))
    figures: dict[str, dict[str, Any]] = {}
    with conditions(with_neighbour=neighbour) as found:
        for index, name in enumerate(found.names):
            these = with_other_prompts(jobs, index, vocab_size=args.vocab_size)
            with found.under(name):
                figures[_COLUMNS[name]] = _measure(engine, these, load, slo)
    engine.release()
    group.comm.close()
    where = {
        "ranks": group.comm.size,
        "threads": torch.get_num_threads(),
        "device": engine.runner.device.type,
        "dtype": str(engine.runner.dtype).removeprefix("torch."),
        "kernels": kernels_of(engine),
    }
    print(f"{subject.name}: {', '.join(f'{key} {value}' for key, value in where.items())}; {describe(load, slo)}")
    print(table(figures))
    _show_steps(figures)
    settings = {**asdict(load), **asdict(slo), "max_batch_size": max_batch_size, **where}
    settings["speculative_tokens"] = options.speculative_tokens
    document = {"checkpoint": subject.name, **settings, **figures["offline"]}
    finish("load", document | ({BESIDE: figures[BESIDE]} if BESIDE in figures else {}), plot)


def _measure(engine: Engine, jobs: Sequence[Job], load: Load, slo: Slo) -> dict[str, Any]:
    before, cpu_s = engine.stats(), process_time()
    steps: list[float] = []
    recorder = drive(engine, jobs, concurrency=load.concurrency, steps=steps)
    cpu_s, after = process_time() - cpu_s, engine.stats()
    p50, p99 = (1e3 * float(value) for value in np.percentile(steps, (50, 99)))
    figures = summarize(jobs, recorder.traces, slo)
    return {
        **figures,
        "leader_cpu_s": cpu_s,
        "step_p50_ms": p50,
        "step_p99_ms": p99,
        "drafted_tokens": after.drafted_tokens - before.drafted_tokens,
        "accepted_tokens": after.accepted_tokens - before.accepted_tokens,
    }


def _show_steps(figures: dict[str, dict[str, Any]]) -> None:
    for name, one in figures.items():
        print(f"Steps, {name}: median {one['step_p50_ms']:.2f} ms, p99 {one['step_p99_ms']:.2f} ms")
    if BESIDE in figures:
        ratio = figures[BESIDE]["output_throughput"] / figures["offline"]["output_throughput"]
        worst = figures[BESIDE]["p99_itl_ms"] / figures["offline"]["median_itl_ms"]
        print(f"Output tokens per second, beside / idle: {ratio:.2f}; p99 ITL beside / median ITL idle: {worst:.2f}")


def drive(engine: Engine, jobs: Sequence[Job], *, concurrency: int = 0, steps: list[float] | None = None) -> Recorder:
    """Run the jobs as they arrive, each to exactly its requested number of tokens. `steps` gets the seconds of each."""
    recorder = Recorder(len(jobs))
    coming = deque(range(len(jobs)))
    while coming or engine.num_requests:
        while coming and jobs[coming[0]].arrival_s <= recorder.now():
            if concurrency and engine.num_requests >= concurrency:
                break
            index = coming.popleft()
            recorder.start(index, recorder.now() if concurrency else jobs[index].arrival_s)
            params = SamplingParams(max_new_tokens=jobs[index].new, temperature=0)
            engine.add(Request(str(index), jobs[index].prompt, params))
        if engine.num_requests:
            start = perf_counter()
            events = engine.step()
            if steps is not None:
                steps.append(perf_counter() - start)
            for event in events:
                assert event.token_id is not None, f"request {event.request_id} ended early: {event.error}"
                recorder.tokens(int(event.request_id))
        else:
            sleep(min(max(0.0, jobs[coming[0]].arrival_s - recorder.now()), engine.config.heartbeat_s))
            engine.heartbeat()
    assert [trace.num_tokens for trace in recorder.traces] == [job.new for job in jobs]
    return recorder
