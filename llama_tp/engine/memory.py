"""What one rank's memory holds: its weights, the largest step, and a KV cache of what is left."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from llama_tp import control_groups
from llama_tp.config import EngineConfig, ModelArgs, parse_memory
from llama_tp.engine.request import Chunk, Request, SamplingParams, Sequence, StepPlan
from llama_tp.engine.runner import ModelRunner
from llama_tp.engine.sampler import Sampler
from llama_tp.parallel.apply import local_kv_heads
from llama_tp.parallel.plan import num_parameters_of_rank

DEFAULT_SHARE = {"cuda": 0.9, "cpu": 0.5}
"""Of the memory that weights and steps leave free, the most that the KV cache takes by default. A host has other uses
for its memory, a GPU usually has not."""
_FRAGMENTATION = 1.25
_HEADROOM = 256 << 20
"""Bytes for what is allocated outside of PyTorch's allocator later: cuBLAS workspaces, NCCL's channels, modules."""


@dataclass(frozen=True, slots=True)
class MemoryModel:
    """One rank's needs in bytes. The methods raise ValueError, with the remedy, if something does not fit."""

    config: EngineConfig
    weights: int
    page: int
    """One page of KV cache, keys and values of all layers."""
    is_float32_by_choice: bool
    """Whether dtype=auto chose float32: bfloat16 would then halve the weights."""

    @classmethod
    def of(cls, args: ModelArgs, config: EngineConfig, size: int, dtype: torch.dtype) -> MemoryModel:
        """For one rank of `size`."""
        page = 2 * args.n_layers * config.page_size * local_kv_heads(args, size) * args.head_dim * dtype.itemsize
        weights = num_parameters_of_rank(args, size) * dtype.itemsize
        return cls(config, weights, page, config.dtype == "auto" and dtype == torch.float32)

    def check(self, available: int | None) -> None:
        """Before anything is loaded: can the weights and the least KV cache fit into `available` bytes?"""
        if available is None:
            return
        least, what = self.config.pages_per_sequence * self.page, f"one sequence of {self._max_seq_len} needs"
        remedy = "use more ranks, or lower max_seq_len"
        if (asked := self._cache_bytes()) is not None:
            least, what, remedy = asked, f"{self._asked} asks for", "lower it, or give a share such as 0.9"
        if self.weights + least > available:
            raise ValueError(
                f"{what} {_gib(least)} of KV cache beside {_gib(self.weights)} of weights on each rank, but "
                f"{_gib(available)} are free; {remedy}{self._or_bfloat16}"
            )

    def num_pages(self, available: int | None, step: int, device_type: str) -> int:
        """Pages of KV cache for a rank that has loaded its weights, has `available` bytes free, and needs `step` of
        them while it computes."""
        config = self.config
        left = None if available is None else max(0, available - step)
        asked = self._cache_bytes()
        if config.kv_cache_memory is None:
            pages = config.num_pages
            if left is not None:
                share = int(DEFAULT_SHARE[device_type] * left) // self.page
                pages = min(pages, max(share, config.pages_per_sequence))
        elif asked is not None:
            pages = asked // self.page
        elif left is not None:
            pages = int(float(parse_memory(config.kv_cache_memory)) * left) // self.page
        else:
            raise ValueError(f"{self._asked}: this system does not tell how much memory is free; give bytes")
        if pages < config.pages_per_sequence:
            raise ValueError(
                f"{self._asked} holds {pages * config.page_size} tokens on a rank, not one sequence of "
                f"{self._max_seq_len}; raise the one or lower the other"
            )
        if left is not None and pages * self.page > left:
            raise ValueError(
                f"the KV cache needs {_gib(pages * self.page)} on each rank, and a step {_gib(step)}, but "
                f"{_gib(available or 0)} are free beside the weights; lower max_seq_len, max_batched_tokens or "
                f"kv_cache_memory, or use more ranks{self._or_bfloat16}"
            )
        return pages

    def _cache_bytes(self) -> int | None:
        """What kv_cache_memory asks for, if it is a number of bytes."""
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
    def _or_bfloat16(self) -> str:
        return "; or set dtype to bfloat16, which halves the weights" if self.is_float32_by_choice else ""


def free_memory(device: torch.device) -> int | None:
    """Bytes that this rank can have: of its GPU, or its share of what the host and its control groups leave. None if
    the system does not tell."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what PyTorch holds in reserve is free, too
        return torch.cuda.mem_get_info(device)[0]
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        return None
    if found is None:
        return None
    free = min(1024 * int(found[1]), *control_groups.free_memory(), 1 << 62)
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def measure_step(runner: ModelRunner, *, is_leader: bool) -> int:
    """Bytes that the largest steps take on a GPU beside weights and KV cache: measured by computing them.
    Call it on all ranks.

    `runner` has a cache of `config_for_measuring`.
    """
    torch.cuda.reset_peak_memory_stats(runner.device)
    before = torch.cuda.memory_allocated(runner.device)
    try:
        compute_largest_steps(runner, is_leader=is_leader)
    except torch.OutOfMemoryError:
        raise ValueError(
            f"a step of max_batched_tokens={runner.config.max_batched_tokens} tokens does not fit beside the weights; "
            "lower max_batched_tokens, max_batch_size or max_seq_len, or use more ranks"
        ) from None
    torch.cuda.synchronize(runner.device)
    peak = torch.cuda.max_memory_allocated(runner.device) - before
    return int(_FRAGMENTATION * peak) + _HEADROOM


def config_for_measuring(config: EngineConfig) -> EngineConfig:
    """The same limits with the least KV cache that the largest steps need."""
    return replace(config, cache_pages=config.pages_per_sequence + config.max_batch_size)


def compute_largest_steps(runner: ModelRunner, *, is_leader: bool) -> None:
    """A full chunk of prefill at the end of the longest context, and a full batch of decodes, sampled with all that
    SamplingParams can ask for."""
    params = SamplingParams(temperature=1.0, top_k=50, top_p=0.9, min_p=0.01, repetition_penalty=1.1, logprobs=20)
    sampler = Sampler()
    for plan in _largest_plans(runner.config):
        logits = runner.execute(plan)
        if is_leader and logits is not None:
            requests = [Request(str(chunk.row), (0,), params) for chunk in plan.chunks]
            sampler.sample(logits, [Sequence(request, [0], 0) for request in requests])


def _largest_plans(config: EngineConfig) -> Iterator[StepPlan]:
    count = min(config.max_batched_tokens, config.max_seq_len)
    prefill = Chunk(0, config.max_seq_len - count, (0,) * count, sample=True)
    yield StepPlan(1, (prefill,), tuple((0, index, index) for index in range(config.pages_per_sequence)))
    rows = range(config.max_batch_size)
    pages = tuple((row, 0, config.pages_per_sequence + row) for row in rows)
    yield StepPlan(2, tuple(Chunk(row, 0, (0,), sample=True) for row in rows), pages)
    yield StepPlan(3, (), (), tuple(rows))


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"
