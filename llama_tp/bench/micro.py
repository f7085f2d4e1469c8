"""`llama-tp bench micro`: the ceilings of this machine, and how near to them single layers of a model come."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist

from llama_tp.bench.ceilings import FORMATS, Ceilings, LinearRate, linear_rates, linear_shapes, measure_ceilings
from llama_tp.bench.machine import device_name, last_level_cache, load_average
from llama_tp.bench.report import finish
from llama_tp.bench.subject import EngineOptions, join_group
from llama_tp.checkpoint.load import resolve_dtype
from llama_tp.engine.compilation import why_no_kernels
from llama_tp.model.cpu.build import build_kernels
from llama_tp.model.cpu.kernels import Kernels
from llama_tp.model.weights import why_not_quantized
from llama_tp.model_args import ModelArgs
from llama_tp.parallel.comm import Comm

_ROUNDS = 1000


def bench_micro(
    name: str, args: ModelArgs, options: EngineOptions, *, forms: Sequence[str], rows: Sequence[int], plot: str | None
) -> None:
    """Implements `llama-tp bench micro`. Call it on every rank of one host."""
    _check(forms, rows)
    config = options.config()
    group = join_group(config)
    device = group.device
    dtype = resolve_dtype(config.dtype, torch.bfloat16, device, 1)
    communication = _communication(group.comm, device)
    ceilings = measure_ceilings(device, dtype)
    shapes = linear_shapes(args, group.comm.size, group.comm.rank)
    kernels, reason = _kernels(device, dtype)
    rates = linear_rates(shapes, _possible(forms, args), rows, device, dtype, kernels)
    ceilings = ceilings.better(measure_ceilings(device, dtype))
    if group.comm.is_leader:
        where = {
            "device": device_name(device),
            "ranks": group.comm.size,
            "threads": torch.get_num_threads(),
            "cache_bytes": last_level_cache(device),
            "load_average": load_average(),
        }
        _show(name, where, ceilings, communication, rates)
        if reason is not None:
            print(f"Note: no compiled kernels are measured: {reason}")
        figures = {**asdict(ceilings), **communication, "linear": [asdict(rate) for rate in rates]}
        finish("micro", {"model": name, **where, **figures}, plot)
    if dist.is_initialized():
        dist.barrier()
    group.comm.close()


def _check(forms: Sequence[str], rows: Sequence[int]) -> None:
    if not forms or not all(form in FORMATS for form in forms):
        raise ValueError(f"forms={','.join(map(str, forms))} must be some of {', '.join(FORMATS)}")
    if not rows or not all(type(count) is int and count > 0 for count in rows):
        raise ValueError(f"rows={','.join(map(str, rows))} must be integers of at least 1, such as 1,4,16")


def _possible(forms: Sequence[str], args: ModelArgs) -> list[str]:
    return [form for form in forms if form == "dense" or not why_not_quantized(args)]


def _kernels(device: torch.device, dtype: torch.dtype) -> tuple[Kernels | None, str | None]:
    """The compiled kernels, when they are compiled, or why there are none."""
    if reason := why_no_kernels(device, dtype):
        return None, reason
    build = build_kernels()
    path = build.wait()
    if path is None:
        return None, build.error
    try:
        return Kernels(path, torch.get_num_threads()), None
    except (OSError, AttributeError) as error:
        return None, str(error)


def _communication(comm: Comm, device: torch.device) -> dict[str, float]:
    """Median microseconds of an all-reduce of 8 KB, as after half a layer, and of the smallest, which is a barrier."""
    found = {}
    if comm.size > 1:
        for key, elements in (("all_reduce_us", 4096), ("barrier_us", 1)):
            x = torch.ones(elements, dtype=torch.bfloat16, device=device)
            found[key] = _median_us(lambda: comm.all_reduce(x.clone())[0].item())  # noqa: B023
    return found


def _median_us(function: Callable[[], object]) -> float:
    times = []
    for _ in range(_ROUNDS):
        start = perf_counter()
        function()
        times.append(perf_counter() - start)
    return 1e6 * statistics.median(times[_ROUNDS // 10 :])


def _show(
    name: str,
    where: dict[str, Any],
    ceilings: Ceilings,
    communication: dict[str, float],
    rates: Sequence[LinearRate],
) -> None:
    print(
        f"{where['device']}: {where['ranks']} rank(s) of {where['threads']} thread(s), last-level cache "
        f"{where['cache_bytes'] >> 20} MiB, load average {where['load_average']:.1f}"
    )
    print(ceilings)
    for key, us in communication.items():
        print(f"{key.removesuffix('_us').replace('_', ' ')} {us:.1f} us")
    print(f"\n{name}, {ceilings.dtype}: microseconds per call, and the rate at which it reads the weights")
    counts = sorted({rate.rows for rate in rates})
    print(f"{'':<48}" + "".join(f"{f'M = {count}':>24}" for count in counts))
    print(
        f"{'layer':<8}{'out x in':>16}  {'form':<12}{'kernels':<10}"
        + f"{'us':>10}{'GB/s':>8}{'share':>6}" * len(counts)
    )
    for one in rates:
        if one.rows == counts[0]:
            same = [
                rate for rate in rates if (rate.layer, rate.form, rate.kernels) == (one.layer, one.form, one.kernels)
            ]
            cells = "".join(_cell(rate, ceilings) for rate in sorted(same, key=lambda rate: rate.rows))
            shape = f"{one.out_features} x {one.in_features}"
            print(f"{one.layer:<8}{shape:>16}  {one.form:<12}{one.kernels:<10}{cells}")


def _cell(rate: LinearRate, ceilings: Ceilings) -> str:
    share = rate.gb_per_s * 1e9 / ceilings.read_bytes_per_s
    return f"{rate.us:>10.0f}{rate.gb_per_s:>8.1f}{share:>6.0%}"
