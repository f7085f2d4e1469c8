"""Measures how much memory is free, and how much the largest steps need in addition to weights and KV cache."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from llama_tp import control_groups
from llama_tp.config import EngineConfig
from llama_tp.engine.memory import FRAGMENTATION, HEADROOM
from llama_tp.engine.request import Request
from llama_tp.engine.runner import ModelRunner
from llama_tp.engine.sampler import Sampler
from llama_tp.engine.sampling_params import SamplingParams
from llama_tp.engine.scheduler import MAX_SCORED
from llama_tp.engine.scorer import score
from llama_tp.engine.sequence import Sequence, Span
from llama_tp.engine.step import Chunk, StepPlan


def free_memory(device: torch.device) -> int | None:
    """Bytes that this rank can use: of its GPU, or its share of what the host and control groups allow. None if
    unknown."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # memory cached by PyTorch is also free
        return torch.cuda.mem_get_info(device)[0]
    if (available := _meminfo("MemAvailable")) is None:
        return None
    free = min(available, *control_groups.free_memory(), 1 << 62)
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def total_memory(device: torch.device) -> int | None:
    """Bytes that this rank could use at best, without any other process. None if unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    total = _meminfo("MemTotal")
    return None if total is None else total // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _meminfo(name: str) -> int | None:
    """An entry of the host's /proc/meminfo in bytes; None if there is none."""
    try:
        found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        return None
    return 1024 * int(found[1]) if found else None


def measure_step(runner: ModelRunner, *, is_leader: bool) -> int:
    """Bytes that the largest steps need on a GPU in addition to weights and KV cache, measured by running them.
    Call it on all ranks.

    `runner` must have the cache of `config_for_measuring`.
    """
    torch.cuda.reset_peak_memory_stats(runner.device)
    before = torch.cuda.memory_allocated(runner.device)
    try:
        compute_largest_steps(runner, is_leader=is_leader)
    except torch.OutOfMemoryError:
        raise ValueError(
            f"a step of max_batched_tokens={runner.config.max_batched_tokens} does not fit in memory with the weights; "
            "reduce max_batched_tokens, max_batch_size or max_seq_len, or use more ranks"
        ) from None
    torch.cuda.synchronize(runner.device)
    peak = torch.cuda.max_memory_allocated(runner.device) - before
    return int(FRAGMENTATION * peak) + HEADROOM


def config_for_measuring(config: EngineConfig) -> EngineConfig:
    """The same limits with the minimum KV cache for the largest steps."""
    return replace(config, cache_pages=config.pages_per_sequence + config.max_batch_size)


def compute_largest_steps(runner: ModelRunner, *, is_leader: bool) -> None:
    """A full prefill chunk at the end of the longest context, scored as far as possible, and a full batch of decodes,
    with every sampling feature on."""
    params = SamplingParams(
        temperature=1.0, top_k=50, top_p=0.9, min_p=0.01, repetition_penalty=1.1, logprobs=20, prompt_logprobs=20
    )
    sampler = Sampler()
    for plan in _largest_plans(runner.config):
        logits = runner.execute(plan)
        if is_leader and logits is not None:
            sequences = [Sequence(Request(str(chunk.row), (0,), params), [0]) for chunk in plan.chunks]
            num_scored = logits.size(0) - len(sequences)
            score(logits, [Span(sequences[0], 0, (0,) * num_scored)])
            logits = logits[num_scored:].clone()
            sampler.sample(logits, sequences)


def _largest_plans(config: EngineConfig) -> Iterator[StepPlan]:
    count = min(config.max_batched_tokens, config.max_seq_len)
    num_logits = min(count, MAX_SCORED + config.max_batch_size)
    prefill = Chunk(0, config.max_seq_len - count, (0,) * count, num_logits)
    yield StepPlan(1, (prefill,), tuple((0, index, index) for index in range(config.pages_per_sequence)))
    rows = range(config.max_batch_size)
    pages = tuple((row, 0, config.pages_per_sequence + row) for row in rows)
    yield StepPlan(2, tuple(Chunk(row, 0, (0,), num_logits=1) for row in rows), pages)
    yield StepPlan(3, (), (), tuple(rows))
