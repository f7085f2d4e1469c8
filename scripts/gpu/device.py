"""The device under test, and timing of calls on it.

With --cpu-smoke everything runs on a CPU with tiny sizes, to test these scripts.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

SMOKE = "--cpu-smoke" in sys.argv
CUDA = torch.cuda.is_available() and not SMOKE
DEVICE = torch.device("cuda", 0) if CUDA else torch.device("cpu")
INTERPRETED = not CUDA and os.environ.get("TRITON_INTERPRET") == "1"
"""Triton kernels run on the CPU."""
DTYPE = torch.float32 if INTERPRETED else torch.bfloat16  # the interpreter's tl.dot treats bfloat16 as integers
THREADS = 1 if SMOKE else None
"""For engines on the CPU."""


def sync() -> None:
    if CUDA:
        torch.cuda.synchronize()


def seconds_of(function: Callable[[], Any]) -> float:
    """Time of one call, on the host."""
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def call_us(function: Callable[[], Any], repeats: int = 20, warmup: int = 3) -> float:
    """Median microseconds of one call: on a GPU between two events, including gaps between launches."""
    repeats, warmup = (2, 1) if SMOKE else (repeats, warmup)
    for _ in range(warmup):
        function()
    sync()
    return statistics.median(_call_us(function) for _ in range(repeats))


def _call_us(function: Callable[[], Any]) -> float:
    if not CUDA:
        return 1e6 * seconds_of(function)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    function()
    last.record()
    last.synchronize()
    return 1e3 * float(first.elapsed_time(last))


def graph_us(function: Callable[[], Any], repeats: int = 10) -> float:
    """Median microseconds of one call replayed from a CUDA graph: the time of its kernels without the host."""
    return call_us(capture(function).replay, repeats) if CUDA else call_us(function)


def capture(function: Callable[[], Any]) -> Any:
    """A CUDA graph of one call."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph


def randn(*shape: int, std: float = 1.0, dtype: torch.dtype = DTYPE) -> Tensor:
    """Random values, generated on the device."""
    return torch.empty(*shape, device=DEVICE, dtype=dtype).normal_(0, std)


MAX_ERROR = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
"""A relative error above this is a bug, not rounding."""


def relative_error(ours: Tensor, exact: Tensor) -> float:
    return round(float((ours.float() - exact.float()).norm() / exact.float().norm()), 7)


@contextmanager
def cudnn_attention(enabled: bool) -> Iterator[None]:
    """Whether SDPA may choose cuDNN."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(enabled)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def kernel_times(function: Callable[[], Any], most: int = 16) -> dict[str, Any]:
    """One call under the profiler: its kernels (on a CPU: operators) and the device's busy time, by kernel."""
    from torch.profiler import ProfilerActivity, profile

    sync()
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if CUDA else [ProfilerActivity.CPU]
    with profile(activities=activities) as profiler:
        function()
        sync()
    kind = torch.autograd.DeviceType.CUDA if CUDA else torch.autograd.DeviceType.CPU
    kernels = sorted(
        (event.time_range.start, event.time_range.end, event.name)
        for event in profiler.events()
        if event.device_type == kind
    )
    busy, end = 0.0, 0.0
    by_name: dict[str, list[float]] = {}
    for start, stop, name in kernels:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
        by_name.setdefault(name[:70], []).append(stop - start)
    wall = end - kernels[0][0] if kernels else 0.0
    top = sorted(by_name.items(), key=lambda item: -sum(item[1]))[:most]
    return {
        "kernels": len(kernels),
        "wall_ms": round(wall / 1e3, 3),
        "busy_ms": round(busy / 1e3, 3),
        "gaps_us": round(wall - busy, 1),
        "count, total us, median us": {
            name: [len(times), round(sum(times), 1), round(statistics.median(times), 2)] for name, times in top
        },
    }
