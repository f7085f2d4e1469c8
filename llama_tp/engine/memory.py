"""One rank's memory budget: weights, the largest step, and a KV cache in the remainder. Arithmetic only: `memory_probe`
measures free memory and the memory of a step.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from llama_tp.config import EngineConfig, parse_memory
from llama_tp.model.cpu.buffers import MAX_TOKENS, buffer_bytes
from llama_tp.model.weights import (
    DENSE,
    DENSE_FORMATS,
    PACKED,
    Layout,
    Shapes,
    WeightFormat,
    WeightFormats,
    layer_shapes,
    num_bytes,
)
from llama_tp.model_args import ModelArgs
from llama_tp.parallel.sharding import Ranks, local_kv_heads, local_shape

DEFAULT_SHARE = {"cuda": 0.9, "cpu": 0.5}
"""Default limit of the KV cache, as a share of the memory left after weights and steps. A host has other uses for its
memory; a GPU usually does not."""

FRAGMENTATION = 1.25
"""Memory that PyTorch's allocator takes, as a multiple of what the tensors of a step need."""
HEADROOM = 256 << 20
"""Bytes for later allocations outside PyTorch's allocator: cuBLAS workspaces, NCCL channels, modules."""

ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4}
"""Bytes per element."""


@dataclass(frozen=True, slots=True)
class MemoryModel:
    """One rank's memory needs in bytes. The methods raise ValueError, with the remedy, if something does not fit."""

    config: EngineConfig
    device_type: str
    """cpu or cuda."""
    weights: int
    page: int
    """One page of KV cache: keys and values of all layers."""
    buffers: int
    """Of the compiled kernels, if they may compute."""
    is_float32_by_choice: bool
    """Whether dtype=auto chose float32: bfloat16 would then halve the weights."""

    @classmethod
    def of(
        cls,
        args: ModelArgs,
        config: EngineConfig,
        ranks: Ranks,
        rank: int,
        dtype: str,
        device_type: str,
        formats: WeightFormats = DENSE_FORMATS,
        layout: Layout = PACKED,
        num_threads: int = 1,
    ) -> MemoryModel:
        """For one of the ranks, computing in `dtype` with this number of threads, with layers in `layout`."""
        itemsize = ITEMSIZE[dtype]
        weights = _weight_bytes(args, ranks, rank, dtype, formats, device_type, layout)
        page = 2 * args.n_layers * config.page_size * local_kv_heads(args, ranks, rank) * args.head_dim * itemsize
        has_kernels = device_type == "cpu" and layout != PACKED
        buffers = kernel_buffers(args, config, ranks, rank, dtype, num_threads) if has_kernels else 0
        return cls(config, device_type, weights, page, buffers, config.dtype == "auto" and dtype == "float32")

    @property
    def token(self) -> int:
        """KV cache bytes per token."""
        return self.page // self.config.page_size

    def check(self, available: int | None) -> None:
        """Before loading: check that the weights and the minimum KV cache fit in `available` bytes."""
        if available is None:
            return
        least, what = self.config.pages_per_sequence * self.page, f"one sequence of {self._max_seq_len} needs"
        remedy = "use more ranks, or reduce max_seq_len"
        if (asked := self._cache_bytes()) is not None:
            least, what, remedy = asked, f"{self._asked} requests", "reduce it, or set a share such as 0.9"
        if self.weights + self.buffers + least > available:
            raise ValueError(
                f"{what} {_gib(least)} of KV cache in addition to {_gib(self.weights)} of weights{self._and_buffers} "
                f"on each rank, but only {_gib(available)} are free; {remedy}{self._or_bfloat16}"
            )

    def num_pages(self, available: int | None, step: int) -> int:
        """Pages of KV cache for a rank that, with its weights loaded, has `available` bytes free and needs `step` of
        them for computing: what was measured, or the kernels' `buffers`."""
        config = self.config
        left = None if available is None else max(0, available - step)
        asked = self._cache_bytes()
        if config.kv_cache_memory is None:
            pages = config.num_pages
            if left is not None:
                share = int(DEFAULT_SHARE[self.device_type] * left) // self.page
                pages = min(pages, max(share, config.pages_per_sequence))
        elif asked is not None:
            pages = asked // self.page
        elif left is not None:
            pages = int(float(parse_memory(config.kv_cache_memory)) * left) // self.page
        else:
            raise ValueError(f"{self._asked}: cannot determine how much memory is free on this system; set bytes")
        if pages < config.pages_per_sequence:
            raise ValueError(
                f"{self._asked} holds only {pages * config.page_size} tokens on each rank, less than one sequence of "
                f"{self._max_seq_len}; raise the former or reduce the latter"
            )
        if left is not None and pages * self.page > left:
            raise ValueError(
                f"the KV cache needs {_gib(pages * self.page)} on each rank, and a step {_gib(step)}, but only "
                f"{_gib(available or 0)} are free after the weights; reduce max_seq_len, max_batched_tokens or "
                f"kv_cache_memory, or use more ranks{self._or_bfloat16}"
            )
        return pages

    def _cache_bytes(self) -> int | None:
        """kv_cache_memory, if it is a number of bytes."""
        memory = self.config.kv_cache_memory
        parsed = None if memory is None else parse_memory(memory)
        return parsed if isinstance(parsed, int) else None

    @property
    def _asked(self) -> str:
        return f"kv_cache_memory={self.config.kv_cache_memory!r}"

    @property
    def _max_seq_len(self) -> str:
        return f"max_seq_len={self.config.max_seq_len}"

    @property
    def _and_buffers(self) -> str:
        return f" and {_gib(self.buffers)} of buffers" if self.buffers else ""

    @property
    def _or_bfloat16(self) -> str:
        return "; or set dtype to bfloat16, which halves the weights" if self.is_float32_by_choice else ""


def _weight_bytes(
    args: ModelArgs, ranks: Ranks, rank: int, dtype: str, formats: WeightFormats, device_type: str, layout: Layout
) -> int:
    """Bytes of a rank's weights once prepared for the device."""
    itemsize = ITEMSIZE[dtype]
    layer, other = layer_shapes(args)
    if args.tied_embeddings and device_type == "cpu" and layout == PACKED:
        # PyTorch multiplies with a packed copy of the matrix, and looks up tokens in the plain one.
        other["output.weight"] = other["tok_embeddings.weight"]

    def size_of(shapes: Shapes, formats_of_modules: Mapping[str, WeightFormat]) -> int:
        sizes = 0
        for name, shape in shapes.items():
            local = local_shape(args, name, shape, ranks, rank)
            linear = formats_of_modules.get(name.removesuffix(".weight"))
            if linear is None:
                sizes += math.prod(local) * itemsize
            else:
                rows, columns = local
                sizes += num_bytes(linear.held(rows, columns, dtype, device_type, layout), itemsize)
        return sizes

    # Few kinds of layers, often one: those whose linear layers have the same formats.
    modules = [name.removesuffix(".weight") for name, shape in layer.items() if len(shape) == 2]
    kinds = Counter(
        tuple(formats.get(module.replace(".0.", f".{index}."), DENSE) for module in modules)
        for index in range(args.n_layers)
    )
    of_layers = sum(count * size_of(layer, dict(zip(modules, kind, strict=True))) for kind, count in kinds.items())
    return of_layers + size_of(other, {"output": formats.get("output", DENSE)})


def kernel_buffers(args: ModelArgs, config: EngineConfig, ranks: Ranks, rank: int, dtype: str, num_threads: int) -> int:
    """Bytes of the compiled kernels' buffers on a rank, if there are kernels for the dtype."""
    if dtype not in MAX_TOKENS:
        return 0
    layer, _ = layer_shapes(args)

    def rows(name: str) -> int:
        return local_shape(args, name, layer[name], ranks, rank)[0]

    return buffer_bytes(
        dim=args.dim,
        hidden=rows("layers.0.feed_forward.w1.weight"),
        heads=rows("layers.0.attention.wq.weight") // args.head_dim,
        kv_heads=local_kv_heads(args, ranks, rank),
        head_dim=args.head_dim,
        dtype=dtype,
        max_seq_len=config.max_seq_len,
        num_threads=num_threads,
    )


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"
