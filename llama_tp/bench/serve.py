"""`llama-tp bench serve`: the same load through a real TorchServe and the offline engine, alternating in one run.

The offline engine runs in its own process. The server stays up, idle, and the CPU time it uses then is also measured.
Both have the same weights, dtype, context, batch size, step size and threads, and get the same requests.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import process_time
from typing import Any

import yaml

from llama_tp.bench import client
from llama_tp.bench.api import Api
from llama_tp.bench.machine import cpu_seconds
from llama_tp.bench.report import finish
from llama_tp.bench.workload import (
    Job,
    Load,
    Slo,
    context_of,
    describe,
    summarize,
    table,
    warm_up,
    with_other_prompts,
    workload,
)
from llama_tp.model.cpu.build import build_kernels
from llama_tp.model_args import ModelArgs
from llama_tp.threads import available_cores
from llama_tp.torchserve.archive import build_archive
from llama_tp.torchserve.errors import ServerError
from llama_tp.torchserve.processes import descendants
from llama_tp.torchserve.server import TorchServe, free_port_range

NAME = "bench"
Figures = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """Settings common to both sides."""

    checkpoint: str
    tokenizer: str
    max_batch_size: int = 16
    max_batched_tokens: int = 512
    tp: int = 1
    threads: int = 1
    """Per rank."""
    dtype: str = "auto"
    compile: bool | str = "auto"

    def __post_init__(self) -> None:
        for name in ("max_batch_size", "max_batched_tokens", "tp", "threads"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} must be an integer of at least 1")


@dataclass(frozen=True, slots=True)
class Cpu:
    """CPU seconds, user and system, used by the server's processes so far."""

    frontend: float
    """Java."""
    ranks: float
    """All ranks, with all their threads."""
    main_threads: float
    """The ranks' main threads, which talk to the frontend. The engine computes in other threads."""
    agent: float
    """torchrun."""

    def __sub__(self, other: Cpu) -> Cpu:
        return Cpu(*(getattr(self, name) - getattr(other, name) for name in asdict(self)))

    @property
    def total(self) -> float:
        return self.frontend + self.ranks + self.agent


def cpu_of(server: TorchServe) -> Cpu:
    """CPU time used by a running server."""
    java = server.pid
    if java is None:
        raise ServerError(f"torchserve has exited; see {server.run_dir / 'logs'}")
    below = descendants(java)
    ranks = [pid for pid in below if "LOCAL_RANK=" in _environment_of(pid)]
    return Cpu(
        frontend=cpu_seconds(f"/proc/{java}/stat"),
        ranks=sum(cpu_seconds(f"/proc/{pid}/stat") for pid in ranks),
        main_threads=sum(cpu_seconds(f"/proc/{pid}/task/{pid}/stat") for pid in ranks),
        agent=sum(cpu_seconds(f"/proc/{pid}/stat") for pid in below if pid not in ranks),
    )


def _environment_of(pid: int) -> str:
    return Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")


def bench_serve(
    setup: Setup,
    load: Load,
    slo: Slo,
    *,
    apis: Sequence[Api],
    runs: int,
    handler: str | Path,
    properties: str | Path,
    log_config: str | Path,
    timeout_s: float,
    plot: str | None = None,
) -> None:
    """Implements `llama-tp bench serve` with a server of its own. Each run measures the engine, then each API."""
    args = ModelArgs.load_converted(Path(setup.checkpoint, "model_args.json"))
    shape = {"vocab_size": args.vocab_size, "max_seq_len": context_of(args.max_seq_len)}
    print(f"{setup.checkpoint}: {setup.tp} rank(s) of {setup.threads} thread(s), batch of {setup.max_batch_size}")
    print(describe(load, slo), flush=True)
    found: list[dict[str, Figures]] = []
    if setup.compile is not False:
        build_kernels().wait()  # the server must not switch to them while it is measured
    with _running(setup, load, shape["max_seq_len"], handler, properties, log_config, timeout_s) as server:
        for api in apis:
            client.drive(warm_up(setup.max_batch_size, **shape), _target(server), api, concurrency=0)
        for run in range(runs):
            this = replace(load, seed=load.seed + run)
            idle = cpu_of(server)
            offline = _offline(setup, this, slo)
            idle_s = (cpu_of(server) - idle).total
            found.append({"offline": offline})
            for at, api in enumerate(apis):
                jobs = with_other_prompts(workload(this, **shape), at, vocab_size=args.vocab_size)
                found[-1][api.name] = {**_served(server, api, jobs, this, slo), "idle_cpu_s": idle_s}
            print(f"\nRun {run + 1} of {runs}, load average {os.getloadavg()[0]:.1f}")
            print(table(found[-1]))
            for api in apis:
                print(f"\n{api.name}\n{where_it_goes(offline, found[-1][api.name])}", flush=True)
    print()
    ratios = {api.name: _ratios(found, api.name) for api in apis}
    settings = {**asdict(setup), **asdict(load), **asdict(slo)}
    finish("serve", {**settings, "output_throughput_ratios": ratios, "runs": found}, plot)


def _ratios(runs: Sequence[Mapping[str, Figures]], name: str) -> list[float]:
    """Throughput through an API, relative to the engine's, of each run. Prints their median."""
    ratios = [run[name]["output_throughput"] / run["offline"]["output_throughput"] for run in runs]
    each = ", ".join(f"{one:.3f}" for one in ratios)
    print(f"Output tokens per second, {name} / offline: {statistics.median(ratios):.3f} (median of {each})")
    return ratios


def where_it_goes(offline: Figures, served: Figures) -> str:
    """The added latency, and the CPU time used outside the engine, as text."""
    later = ", ".join(
        f"median {name.upper()} {served[key] - offline[key]:+.2f} ms"
        for name in ("ttft", "itl", "tpot")
        for key in [f"median_{name}_ms"]
    )
    engine = served["ranks_cpu_s"] - served["main_threads_cpu_s"]
    overhead = {
        "frontend (Java)": served["frontend_cpu_s"],
        "ranks' main threads": served["main_threads_cpu_s"],
        "client": served["client_cpu_s"],
        "torchrun": served["agent_cpu_s"],
    }
    share = sum(overhead.values()) / served["duration"] / available_cores()
    per_token = 1e6 * sum(overhead.values()) / served["total_output_tokens"]
    return "\n".join(
        (
            f"Served - offline: {later}",
            f"CPU seconds, served: engine threads {engine:.2f}, "
            + ", ".join(f"{name} {value:.2f}" for name, value in overhead.items()),
            f"All but the engine: {share:.1%} of the machine, {per_token:.0f} us per token",
            f"CPU seconds, offline: leader {offline['leader_cpu_s']:.2f}, idle server {served['idle_cpu_s']:.2f}",
        )
    )


def _target(server: TorchServe) -> client.Target:
    return client.Target(port=server.port, path=f"/predictions/{server.model_name}")


def _served(server: TorchServe, api: Api, jobs: Sequence[Job], load: Load, slo: Slo) -> Figures:
    before, client_s = cpu_of(server), process_time()
    recorder = client.drive(jobs, _target(server), api, concurrency=load.concurrency)
    client_s = process_time() - client_s
    used = cpu_of(server) - before
    assert [trace.num_tokens for trace in recorder.traces] == [job.new for job in jobs]
    cpu = {f"{name}_cpu_s": value for name, value in asdict(used).items()}
    return {**summarize(jobs, recorder.traces, slo), "client_cpu_s": client_s, **cpu}


def _offline(setup: Setup, load: Load, slo: Slo) -> Figures:
    """Run `llama-tp bench load` in separate processes; returns its final JSON."""
    launcher = ["-m", "torch.distributed.run", "--nnodes=1", f"--nproc-per-node={setup.tp}"]
    launcher += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "--local-addr=127.0.0.1"]
    options = {**asdict(load), **asdict(slo), "dtype": setup.dtype, "compile": setup.compile, "device": "cpu"}
    options |= {"max_batch_size": setup.max_batch_size, "max_batched_tokens": setup.max_batched_tokens}
    options["threads"] = setup.threads
    names = {"ttft_ms": "slo_ttft_ms", "tpot_ms": "slo_tpot_ms"}
    command = [sys.executable, *(launcher if setup.tp > 1 else []), "-m", "llama_tp", "bench", "load"]
    command += [setup.checkpoint, *(f"--{names.get(name, name)}={value}" for name, value in options.items())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise ServerError(f"the offline engine failed: {lines[-1] if lines else f'exit code {done.returncode}'}")
    figures: Figures = json.loads(done.stdout.splitlines()[-1])
    assert (figures["ranks"], figures["threads"]) == (setup.tp, setup.threads)
    return figures


@contextmanager
def _running(
    setup: Setup,
    load: Load,
    max_seq_len: int,
    handler: str | Path,
    properties: str | Path,
    log_config: str | Path,
    timeout_s: float,
) -> Iterator[TorchServe]:
    """A dedicated TorchServe, ready. Removed afterwards, except its logs if anything fails."""
    folder = Path(tempfile.mkdtemp(prefix="llama_tp.bench."))
    store = folder / "model_store"
    try:
        config = folder / "model-config.yaml"
        config.write_text(yaml.safe_dump(model_config(setup, load, max_seq_len)))
        build_archive(
            model_name=NAME,
            config_file=config,
            checkpoint=setup.checkpoint,
            tokenizer=setup.tokenizer,
            handler=handler,
            model_store=store,
        )
        server = TorchServe(
            model_store=store,
            model_name=NAME,
            run_dir=folder,
            port=free_port_range(3),
            properties=properties,
            log_config=log_config,
        )
        try:
            server.start()
            server.wait_until_ready(timeout_s)
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(store, ignore_errors=True)
        if sys.exc_info()[0] is None or not (folder / "logs").exists():
            shutil.rmtree(folder, ignore_errors=True)


def model_config(setup: Setup, load: Load, max_seq_len: int) -> dict[str, Any]:
    """model-config.yaml for the served side."""
    return {
        "minWorkers": 1,
        "maxWorkers": 1,
        "batchSize": setup.max_batch_size,
        "maxBatchDelay": 1,
        "startupTimeout": 1200,
        "jobQueueSize": max(100, load.requests),  # open loop: no request is rejected
        "deviceType": "cpu",
        "parallelType": "tp",
        "continuousBatching": True,
        "torchrun": {
            "nproc-per-node": setup.tp,
            "rdzv-endpoint": "localhost:0",
            "OMP_NUMBER_THREADS": setup.threads,
        },
        "handler": {
            "converted_ckpt_dir": "converted_checkpoints",
            "tokenizer_path": Path(setup.tokenizer).name,
            "max_seq_len": max_seq_len,
            "max_batch_size": setup.max_batch_size,
            "max_batched_tokens": setup.max_batched_tokens,
            "dtype": setup.dtype,
            "compile": setup.compile,
            "temperature": 0.0,
        },
    }
