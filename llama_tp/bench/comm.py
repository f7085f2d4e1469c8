"""`llama-tp bench comm`: communication costs: publishing a decode plan, and the all-reduce that completes a layer.

Between two plans, as in a step, the ranks meet in an all-reduce; then the leader is briefly busy, as with sampling,
while its followers wait.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from struct import Struct
from time import perf_counter

import torch
import torch.distributed as dist

from llama_tp.bench.report import finish
from llama_tp.engine import codec
from llama_tp.engine.step import Chunk, StepPlan
from llama_tp.parallel.comm import Comm, GroupComm
from llama_tp.parallel.launch import join
from llama_tp.threads import available_cores

_TIME = Struct("d")
_BUSY_S = 200e-6


def bench_comm(*, batch: int, rounds: int, plot: str | None = None) -> None:
    """Implements `llama-tp bench comm`. Call it on every rank of one host. Ends with a line of JSON."""
    group = join("cpu")
    if group.mesh is None:
        raise ValueError("bench comm needs at least 2 ranks; run it under torchrun --nproc-per-node 4")
    rows = []
    for comm in (group.comm, GroupComm("gloo", leader=0, timeout_s=20)):
        leader, last = _publish(comm, batch, rounds)
        reductions = _all_reduce(comm, rounds)
        for what, seconds in (
            ("publish: leader", leader),
            ("publish: last follower", last),
            ("all-reduce of 8 KB", reductions),
        ):
            rows.append(_row(type(comm).__name__, what, seconds))
    if group.comm.is_leader:
        print(
            f"{group.comm.size} ranks on {available_cores()} cores; microseconds; load average {os.getloadavg()[0]:.1f}"
        )
        for row in rows:
            print(f"{row['comm']:<18}{row['what']:<24} median {row['median_us']:8.1f}   p99 {row['p99_us']:8.1f}")
        finish("comm", {"ranks": group.comm.size, "rows": rows}, plot)
    dist.barrier()
    group.comm.close()


def _publish(comm: Comm, batch: int, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds from when a plan is ready on the leader until the leader continues, and until the last follower has
    decoded it."""
    plan = StepPlan(1, tuple(Chunk(row, 100 + row, (7,), 1) for row in range(batch)), ((0, 6, 9),))
    x = torch.ones(4096)
    mine = []

    def one() -> float:
        comm.all_reduce(x.clone())
        start = perf_counter()
        if not comm.is_leader:
            message = comm.publish(None)
            codec.decode(message[: -_TIME.size])
            return perf_counter() - _TIME.unpack(message[-_TIME.size :])[0]
        while perf_counter() - start < _BUSY_S:
            pass
        start = perf_counter()
        comm.publish(codec.encode(plan) + _TIME.pack(start))
        return perf_counter() - start

    for _ in range(rounds):
        mine.append(one())
    every: list[list[float]] = [mine] * comm.size
    dist.all_gather_object(every, mine)
    leader, *followers = every
    return leader, [max(seconds) for seconds in zip(*followers, strict=True)]


def _all_reduce(comm: Comm, rounds: int) -> list[float]:
    """Seconds per all-reduce of 8 KB on the leader."""
    x = torch.ones(4096, dtype=torch.bfloat16)
    return [_timed(lambda: comm.all_reduce(x.clone())) for _ in range(rounds)]


def _timed(function: Callable[[], object]) -> float:
    start = perf_counter()
    function()
    return perf_counter() - start


def _row(comm: str, what: str, seconds: list[float]) -> dict[str, float | str]:
    warm = sorted(seconds[len(seconds) // 10 :])
    return {
        "comm": comm,
        "what": what,
        "median_us": statistics.median(warm) * 1e6,
        "p99_us": warm[len(warm) * 99 // 100] * 1e6,
    }
