"""What the device can do at best: read bandwidth, matrix products, and matrix-vector products in each weight format.

A share of such a ceiling says how good a step is on any machine. All values are random: zeros are faster. Rates are the
best of repeated measurements, since other processes can only make them lower.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from time import perf_counter

import torch
from torch import Tensor

from llama_tp.bench.machine import last_level_cache
from llama_tp.model.cpu.attention import max_tokens
from llama_tp.model.cpu.kernels import Kernels
from llama_tp.model.linear import DenseLinear, Linear
from llama_tp.model.random_weights import RandomWeights, random_linear
from llama_tp.model.weights import DENSE, PACKED, STORED, Layout, Quantized, WeightFormat, layer_shapes
from llama_tp.model_args import ModelArgs
from llama_tp.parallel.sharding import local_shape

CACHE_MULTIPLE = 4
"""How many times the last-level cache a working set must be, to be read from memory."""
_READ_BYTES = {"cpu": 512 << 20, "cuda": 4 << 30}
"""Read at least this much."""
_GEMM_SIZES = {"cpu": ((512, 4096), (2048, 4096)), "cuda": ((4096, 8192), (8192, 8192))}
"""Rows of the input, and of a square matrix."""
_LEAST_S, _LEAST_CALLS = 0.3, 3
"""A rate is the best of at least this many calls, over at least this time."""
_COPIES_BYTES = 1 << 30
"""Most memory for copies of one matrix."""
FORMATS: dict[str, WeightFormat] = {
    "dense": DENSE,
    "int8": Quantized("int8"),
    "int8_groups": Quantized("int8_groups"),
    "int4": Quantized("int4"),
}


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Of one rank's device, while all ranks of a host measure."""

    read_bytes_per_s: float
    flops: float
    """Of dense products in `dtype`, as the engine computes them."""
    dtype: str

    @classmethod
    def of(cls, read_bytes_per_s: float, flops: float, dtype: torch.dtype) -> Ceilings:
        """Rates in a dtype of torch's."""
        return cls(read_bytes_per_s, flops, str(dtype).removeprefix("torch."))

    def better(self, other: Ceilings) -> Ceilings:
        """The higher rates of two measurements."""
        read = max(self.read_bytes_per_s, other.read_bytes_per_s)
        return Ceilings(read, max(self.flops, other.flops), self.dtype)

    def __str__(self) -> str:
        rates = (
            f"read bandwidth {self.read_bytes_per_s / 1e9:.1f} GB/s, matrix products {self.flops / 1e12:.3g} TFLOP/s"
        )
        return f"{rates} in {self.dtype}"


@dataclass(frozen=True, slots=True)
class LinearRate:
    """A linear layer applied to M rows."""

    layer: str
    out_features: int
    in_features: int
    form: str
    kernels: str
    """PyTorch's, or compiled ones."""
    rows: int
    us: float
    """Microseconds per call."""
    gb_per_s: float
    """Bytes of the weights as they are held, per second."""


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Takes about a second."""
    return Ceilings.of(read_bandwidth(device), gemm_rate(device, dtype), dtype)


def read_bandwidth(device: torch.device) -> float:
    """Bytes per second that this rank's threads, or its GPU, read from memory, writing nothing."""
    num_bytes = max(_READ_BYTES[device.type], CACHE_MULTIPLE * last_level_cache(device))
    values = RandomWeights(device).values(num_bytes // 4)
    return max(num_bytes / seconds_of(reduce, device) for reduce in (values.sum, values.amax))


def gemm_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of large products with a dense layer of the engine."""
    weights, best = RandomWeights(device), 0.0
    for rows, size in _GEMM_SIZES[device.type]:
        linear = random_linear("gemm", size, size, DENSE, dtype, weights)
        x = _inputs(rows, size, dtype, device)
        best = max(best, 2 * rows * size * size / seconds_of(lambda: linear(x), device))  # noqa: B023
    return best


@dataclass(frozen=True, slots=True)
class _Multiplier:
    """What computes linear layers."""

    name: str
    layout: Layout
    input_dtype: torch.dtype
    max_rows: float
    multiply: Callable[[Linear, Tensor], Tensor]


def _multipliers(dtype: torch.dtype, kernels: Kernels | None) -> list[_Multiplier]:
    pytorch = _Multiplier("PyTorch", PACKED, dtype, math.inf, lambda layer, x: layer(x))
    if kernels is None:
        return [pytorch]

    def multiply(layer: Linear, x: Tensor) -> Tensor:
        weight = layer.stored()
        assert weight is not None
        return kernels.multiply(weight, None, x, may_round=dtype == torch.bfloat16)

    return [pytorch, _Multiplier("compiled", STORED, torch.float32, max_tokens(torch.bfloat16), multiply)]


def linear_rates(
    shapes: Mapping[str, tuple[int, int]],
    forms: Sequence[str],
    rows: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
    kernels: Kernels | None = None,
) -> list[LinearRate]:
    """Linear layers of these shapes, (out, in) by name, in each weight format; without those that have no kernel here.

    Each layer is copied until all copies exceed the cache several times, and the copies take turns, as layers do.
    `kernels`, too, compute them, for as many rows as in a step of the engine.
    """
    weights, found = RandomWeights(device), []
    for layer, (num_out, num_in) in shapes.items():
        for form, by in product(forms, _multipliers(dtype, kernels)):
            copies = _copies(layer, num_out, num_in, FORMATS[form], dtype, weights, device, by.layout)
            if form != "dense" and isinstance(copies[0], DenseLinear):
                continue  # widened at load
            for count in (count for count in rows if count <= by.max_rows):
                x = _inputs(count, num_in, by.input_dtype, device)
                seconds = seconds_of(lambda: [by.multiply(one, x) for one in copies], device)  # noqa: B023
                us = 1e6 * seconds / len(copies)
                rate = copies[0].num_bytes / us / 1e3
                found.append(LinearRate(layer, num_out, num_in, form, by.name, count, round(us, 2), round(rate, 2)))
    return found


def linear_shapes(args: ModelArgs, size: int = 1, rank: int = 0) -> dict[str, tuple[int, int]]:
    """(out, in) of the linear layers of a step on a rank. Queries, keys and values are one layer, so are w1 and w3."""
    shapes = {
        name.removeprefix("layers.0."): local_shape(args, name, shape, size, rank)
        for group in layer_shapes(args)
        for name, shape in group.items()
    }

    def fused(*names: str) -> tuple[int, int]:
        parts = [shapes[f"{name}.weight"] for name in names]
        return sum(part[0] for part in parts), parts[0][1]

    return {
        "wqkv": fused("attention.wq", "attention.wk", "attention.wv"),
        "wo": fused("attention.wo"),
        "w13": fused("feed_forward.w1", "feed_forward.w3"),
        "w2": fused("feed_forward.w2"),
        "output": fused("tok_embeddings" if args.tied_embeddings else "output"),
    }


def seconds_of(function: Callable[[], object], device: torch.device) -> float:
    """Of one call: the best of several, after one to warm up. On a GPU, calls are launched back to back."""
    with torch.inference_mode():
        _timed(function, device, 1)
        calls = 1 if device.type == "cpu" else max(1, math.ceil(0.02 / _timed(function, device, 1)))
        best, spent, count = math.inf, 0.0, 0
        while spent < _LEAST_S or count < _LEAST_CALLS:
            seconds = _timed(function, device, calls)
            best, spent, count = min(best, seconds / calls), spent + seconds, count + 1
    return best


def _timed(function: Callable[[], object], device: torch.device, calls: int) -> float:
    _synchronize(device)
    start = perf_counter()
    for _ in range(calls):
        function()
    _synchronize(device)
    return perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _copies(
    layer: str,
    num_out: int,
    num_in: int,
    weight_format: WeightFormat,
    dtype: torch.dtype,
    weights: RandomWeights,
    device: torch.device,
    layout: Layout,
) -> list[Linear]:
    first = random_linear(f"{layer}.0", num_out, num_in, weight_format, dtype, weights, layout)
    wanted = min(_COPIES_BYTES, CACHE_MULTIPLE * last_level_cache(device))
    count = max(1, math.ceil(wanted / first.num_bytes))
    others = (
        random_linear(f"{layer}.{index}", num_out, num_in, weight_format, dtype, weights, layout)
        for index in range(1, count)
    )
    return [first, *others]


def _inputs(rows: int, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(rows, size, device=device).to(dtype)
