"""The machine's capabilities: packages, launches, copies, bandwidth, matrix products."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu import kernels
from gpu.device import CUDA, DEVICE, DTYPE, MAX_ERROR, SMOKE, call_us, graph_us, randn, relative_error, seconds_of, sync
from gpu.report import Report

# The products of one layer of Llama 2 7B: (out, in).
SHAPES = {"wqkv": (12288, 4096), "wo": (4096, 4096), "w13": (22016, 4096), "w2": (4096, 11008)}
if SMOKE:
    SHAPES = {"wqkv": (96, 64), "wo": (64, 64), "w13": (128, 64), "w2": (64, 64)}
NUM_LAYERS = 2 if SMOKE else 6  # together larger than the L2 cache

_PACKAGES = ("triton", "transformers", "flash-attn", "flashinfer-python", "torchao", "numpy", "pydantic", "torchserve")


def env(r: Report) -> None:
    r.put("torch", f"{torch.__version__}, cuda {torch.version.cuda}, python {platform.python_version()}")
    r.put("cpu", {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "load": os.getloadavg()[0]})
    packages = {}
    for name in _PACKAGES:
        with suppress(Exception):
            packages[name] = version(name)
    r.put("packages", packages)
    r.put("kernels", {"triton": kernels.HAS_TRITON, "dependent launch": kernels.HAS_PDL})
    if not CUDA:
        return
    p = torch.cuda.get_device_properties(0)
    r.put("gpu", {"name": p.name, "sms": p.multi_processor_count, "gb": round(p.total_memory / 1e9, 1)})
    query = ["nvidia-smi", "--query-gpu=name,driver_version,clocks.sm,clocks.mem,power.limit", "--format=csv,noheader"]
    r.guard("nvidia_smi", lambda: subprocess.run(query, capture_output=True, text=True, timeout=10).stdout.strip())
    r.guard("sdpa_priority", _sdpa_order)
    r.put("launch_us", _launch_us())
    r.put("h2d_host_us_while_busy", _copy_waits())
    one = torch.ones(1, device=DEVICE, dtype=torch.int64)
    r.put("tolist_idle_us", round(1e6 * min(seconds_of(one.tolist) for _ in range(50)), 1))
    r.guard("symmetric_memory", _symmetric_memory)


def backend_name(index: int) -> str:
    from torch.nn.attention import SDPBackend

    return str(SDPBackend(index)).split(".")[-1]


def _sdpa_order() -> list[str]:
    q = randn(1, 2, 16, 64)
    F.scaled_dot_product_attention(q, q, q)  # the order is set by the first call
    return [backend_name(index) for index in torch._C._get_sdp_priority_order()]


def _launch_us() -> dict[str, float]:
    """Host time per launch, from many tiny kernels."""
    x = torch.zeros(16, device=DEVICE)
    for _ in range(200):
        x.add_(1)
    sync()
    begin = time.perf_counter()
    for _ in range(3000):
        x.add_(1)
    host = time.perf_counter() - begin
    sync()
    device = time.perf_counter() - begin
    return {"host": round(1e6 * host / 3000, 2), "with_device": round(1e6 * device / 3000, 2)}


def _copy_waits() -> dict[str, float]:
    """How long a non_blocking copy blocks the host while the device is busy."""
    waits = {}
    for kind in ("pageable", "pinned"):
        for size in (1 << 10, 1 << 15, 1 << 16, 1 << 17, 1 << 20):
            source = torch.ones(size, dtype=torch.uint8)
            source = source.pin_memory() if kind == "pinned" else source
            sync()
            torch.cuda._sleep(60_000_000)  # about 30 ms
            waits[f"{kind} {size >> 10} KiB"] = round(1e6 * seconds_of(lambda: source.to(DEVICE, non_blocking=True)), 1)
            sync()
    return waits


def _symmetric_memory() -> str:
    import torch.distributed as dist
    import torch.distributed._symmetric_memory as symm

    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=DEVICE)
    try:
        group = dist.group.WORLD
        assert group is not None
        buffer = symm.empty(4096, dtype=DTYPE, device=DEVICE)
        symm.rendezvous(buffer, group.group_name)
        buffer.fill_(1)
        us = call_us(lambda: torch.ops.symm_mem.one_shot_all_reduce(buffer, "sum", group.group_name))
        out = torch.ops.symm_mem.one_shot_all_reduce(buffer, "sum", group.group_name)
        return f"one_shot ok, sum {float(out.sum())}, {us:.1f} us at one rank"
    finally:
        dist.destroy_process_group()


Weights = list[dict[str, Any]]
"""By layer and name."""


def _weights() -> Weights:
    return [{name: randn(*shape, std=0.02) for name, shape in SHAPES.items()} for _ in range(NUM_LAYERS)]


def _layers_gb_s(tokens: int, multiply: Callable[[Tensor, Any], Any], weights: Weights) -> float:
    """Bandwidth at which the layers' products, in sequence, read their weights, counted as bfloat16."""
    inputs = {name: randn(tokens, shape[1]) for name, shape in SHAPES.items()}
    us = graph_us(lambda: [multiply(inputs[name], w) for layer in weights for name, w in layer.items()], 5)
    return round(len(weights) * _layer_bytes() / us / 1e3, 1)


def _layer_bytes() -> int:
    return sum(2 * rows * columns for rows, columns in SHAPES.values())


def ceilings(r: Report) -> None:
    """Read and copy bandwidth, and rates of matrix products in bfloat16 and quantized."""
    _bandwidth(r)
    if CUDA:
        a, b = randn(8192, 8192), randn(8192, 8192)
        r.put("gemm_8192_tflops", round(2 * 8192**3 / call_us(lambda: a @ b, 10) / 1e6, 1))
        del a, b
    weights = _weights()
    rates = {}
    for tokens in (32,) if SMOKE else (512, 2048, 8192):
        inputs = {name: randn(tokens, shape[1]) for name, shape in SHAPES.items()}
        us = call_us(lambda: [F.linear(inputs[name], w) for name, w in weights[0].items()], 5)
        rates[str(tokens)] = round(tokens * _layer_bytes() / us / 1e6, 1)  # two operations for two bytes
    r.put("layer_gemm_tflops_by_tokens", rates)
    for tokens in (1, 2, 4, 8, 16, 32, 64, 128):
        r.guard(f"cublas_gb_s_m{tokens}", lambda: _layers_gb_s(tokens, F.linear, weights))
    if CUDA:
        _quantized(r, weights)
        r.guard("mm_out_float32", lambda: str(torch.mm(randn(4, 64), randn(64, 8), out_dtype=torch.float32).dtype))


def _bandwidth(r: Report) -> None:
    elements = (1 << 20) if SMOKE else (1 << 30)
    big = torch.randint(0, 100, (elements,), dtype=torch.int32, device=DEVICE)
    rates = {"sum": round(4 * elements / call_us(lambda: big.view(torch.float32).sum(), 5) / 1e3, 1)}
    if kernels.HAS_TRITON and CUDA:
        for programs, block, warps in ((132 * 8, 8192, 8), (132 * 16, 4096, 8), (132 * 32, 2048, 4)):
            out = torch.empty(programs, dtype=torch.int32, device=DEVICE)
            us = call_us(lambda: kernels.read(big, out, block, warps), 5)
            rates[f"triton {programs}x{block}"] = round(4 * elements / us / 1e3, 1)
    r.put("read_gb_s", rates)
    r.put("read_best_gb_s", max(rates.values()))
    half = big[: elements // 2]
    us = call_us(lambda: big[elements // 2 :].copy_(half), 5)
    r.put("copy_gb_s_read_plus_write", round(2 * half.nbytes / us / 1e3, 1))


def _quantized(r: Report, weights: Weights) -> None:
    """PyTorch's own products. GB/s are of the bfloat16 weights they replace: divide by cuBLAS's for the speedup."""

    def int8(w: Tensor) -> tuple[Tensor, Tensor]:
        return torch.randint(-127, 127, w.shape, dtype=torch.int8, device=DEVICE), randn(w.size(0), std=0.01)

    def int4(w: Tensor, group: int) -> tuple[Tensor, Tensor]:
        packed = torch.randint(0, 255, (w.size(0), w.size(1) // 2), dtype=torch.uint8, device=DEVICE)
        return torch._convert_weight_to_int4pack(packed, 8), randn(w.size(1) // group, w.size(0), 2, std=0.01)

    def of_all(convert: Callable[[Tensor], Any]) -> Weights:
        return [{name: convert(w) for name, w in layer.items()} for layer in weights]

    packed = of_all(int8)
    for tokens in (1, 8):
        r.guard(
            f"int8pack_bf16_equivalent_gb_s_m{tokens}",
            lambda: _layers_gb_s(tokens, lambda x, w: torch._weight_int8pack_mm(x, w[0], w[1]), packed),
        )

    def int4_rates() -> dict[str, float]:
        found = {}
        for group in (128, 32):
            packed = of_all(lambda w: int4(w, group))
            for tokens in (1, 8, 32):
                multiply = lambda x, w: torch._weight_int4pack_mm(x, w[0], group, w[1])  # noqa: E731
                found[f"g{group} m{tokens}"] = _layers_gb_s(tokens, multiply, packed)
        return found

    r.guard("int4pack_bf16_equivalent_gb_s", int4_rates)
    fp8 = of_all(lambda w: (w.to(torch.float8_e4m3fn), torch.rand(1, w.size(0), device=DEVICE)))
    r.guard("fp8_rowwise", lambda: {f"m{tokens}": _fp8_rate(fp8, tokens) for tokens in (16, 32, 128, 512, 2048)})


def _fp8_rate(weights: Weights, tokens: int) -> dict[str, float]:
    inputs = {
        name: (randn(tokens, shape[1]).to(torch.float8_e4m3fn), torch.rand(tokens, 1, device=DEVICE))
        for name, shape in SHAPES.items()
    }

    def step() -> None:
        for layer in weights:
            for name, (w, scale) in layer.items():
                x, x_scale = inputs[name]
                torch._scaled_mm(x, w.t(), x_scale, scale, out_dtype=DTYPE, use_fast_accum=True)

    us = graph_us(step, 5)
    num_bytes = len(weights) * _layer_bytes()
    return {"tflops": round(tokens * num_bytes / us / 1e6, 1), "bf16-equivalent GB/s": round(num_bytes / us / 1e3, 1)}


_TILES = (
    (1, 4096, 4),
    (1, 2048, 4),
    (1, 2048, 2),
    (2, 2048, 4),
    (2, 4096, 8),
    (4, 1024, 4),
    (1, 1024, 2),
    (1, 8192, 8),
)


def gemv(r: Report) -> None:
    """The matrix-vector products of a layer: cuBLAS against our kernel, by tile, without and with PDL."""
    weights = _weights()
    launches = (False, True) if kernels.HAS_PDL else (False,)
    tiles = _TILES if CUDA else ((16, 64, 1), (8, 32, 1))
    fastest: dict[tuple[str, bool], kernels.GemvShape] = {}
    for name, (num_out, num_in) in SHAPES.items():
        x = randn(1, num_in)
        layers = [layer[name] for layer in weights]
        num_bytes = sum(w.nbytes for w in layers)
        rates = {"cublas": round(num_bytes / graph_us(lambda: [F.linear(x, w) for w in layers], 5) / 1e3, 1)}
        for pdl in launches:
            for tile in tiles:
                us = graph_us(lambda: [kernels.gemv(x, w, tile, pdl) for w in layers], 5)
                rates[_label(tile, pdl)] = round(num_bytes / us / 1e3, 1)
            fastest[name, pdl] = max(tiles, key=lambda tile: rates[_label(tile, pdl)])
        r.put(f"{name} {num_out}x{num_in} GB/s", rates)
        exact = F.linear(x.float(), layers[0].float())
        for pdl in launches:
            error = relative_error(kernels.gemv(x, layers[0], fastest[name, pdl], pdl), exact)
            r.expect(f"{name} error{' with PDL' if pdl else ''}", error < MAX_ERROR[DTYPE], error)
    r.guard("a layer's four GB/s, cublas", lambda: _layers_gb_s(1, F.linear, weights))
    for pdl in launches:

        def multiply(x: Tensor, w: tuple[str, Tensor]) -> Tensor:
            return kernels.gemv(x, w[1], fastest[w[0], pdl], pdl)

        named = [{name: (name, w) for name, w in layer.items()} for layer in weights]
        r.guard(f"a layer's four GB/s, own{' with PDL' if pdl else ''}", lambda: _layers_gb_s(1, multiply, named))


def _label(tile: kernels.GemvShape, pdl: bool) -> str:
    rows, columns, warps = tile
    return f"{rows}x{columns}w{warps}{' pdl' if pdl else ''}"
