"""`llama-tp bench load`: requests of mixed lengths with random arrivals, through the engine alone."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from time import process_time, sleep

import torch

from llama_tp.bench.workload import Job, Load, Recorder, Slo, context_of, describe, summarize, table, warm_up, workload
from llama_tp.config import EngineConfig
from llama_tp.engine.engine import Engine
from llama_tp.engine.request import Request
from llama_tp.engine.sampling_params import SamplingParams
from llama_tp.engine.startup import load_engine
from llama_tp.model_args import ModelArgs
from llama_tp.parallel.launch import join


def bench_load(
    checkpoint: str,
    load: Load,
    slo: Slo,
    *,
    max_batch_size: int,
    max_batched_tokens: int,
    speculative_tokens: int,
    speculative_max_batch: int,
    dtype: str,
    compile: bool | str,
    device: str,
    threads: int | None,
) -> None:
    """Implements `llama-tp bench load`. Call it on every rank."""
    args = ModelArgs.load_converted(Path(checkpoint, "model_args.json"))
    config = EngineConfig(
        max_seq_len=context_of(args.max_seq_len),
        max_batch_size=max_batch_size,
        max_batched_tokens=max(max_batched_tokens, max_batch_size),
        speculative_tokens=speculative_tokens,
        speculative_max_batch=speculative_max_batch,
        max_waiting=max(load.requests, max_batch_size),  # open loop: no request is rejected
        dtype=dtype,
        compile=compile,
        device=device,
        threads=threads,
    )
    shape = {"vocab_size": args.vocab_size, "max_seq_len": config.max_seq_len}
    jobs = workload(load, **shape)
    group = join(device, timeout_s=config.collective_timeout_s)
    engine = load_engine(checkpoint, args, config, group)
    if not engine.is_leader:
        engine.follow()
        group.comm.close()
        return
    drive(engine, warm_up(max_batch_size, **shape))
    before, cpu_s = engine.stats(), process_time()
    recorder = drive(engine, jobs, concurrency=load.concurrency)
    cpu_s, after = process_time() - cpu_s, engine.stats()
    engine.release()
    group.comm.close()
    figures = summarize(jobs, recorder.traces, slo)
    where = {
        "ranks": group.comm.size,
        "threads": torch.get_num_threads(),
        "device": engine.runner.device.type,
        "dtype": str(engine.runner.dtype).removeprefix("torch."),
    }
    print(f"{checkpoint}: {', '.join(f'{key} {value}' for key, value in where.items())}; {describe(load, slo)}")
    print(table({"offline": figures}))
    settings = {**asdict(load), **asdict(slo), "max_batch_size": max_batch_size, **where}
    settings["speculative_tokens"] = speculative_tokens
    figures["drafted_tokens"] = after.drafted_tokens - before.drafted_tokens
    figures["accepted_tokens"] = after.accepted_tokens - before.accepted_tokens
    print(json.dumps({"checkpoint": checkpoint, **settings, "leader_cpu_s": cpu_s, **figures}))


def drive(engine: Engine, jobs: Sequence[Job], *, concurrency: int = 0) -> Recorder:
    """Run the jobs as they arrive, each to exactly its requested number of tokens."""
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
            for event in engine.step():
                assert event.token_id is not None, f"request {event.request_id} ended early: {event.error}"
                recorder.tokens(int(event.request_id))
        else:
            sleep(min(max(0.0, jobs[coming[0]].arrival_s - recorder.now()), engine.config.heartbeat_s))
            engine.heartbeat()
    assert [trace.num_tokens for trace in recorder.traces] == [job.new for job in jobs]
    return recorder
