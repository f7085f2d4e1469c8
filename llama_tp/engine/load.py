"""A checkpoint and a group of ranks -> an Engine that is ready to run."""

from __future__ import annotations

import logging
import os
import re
from dataclasses import replace
from pathlib import Path
from time import monotonic

import torch

from llama_tp.checkpoint.agree import agree, gather
from llama_tp.checkpoint.load import load_model, resolve_dtype
from llama_tp.config import EngineConfig, ModelArgs, parse_memory
from llama_tp.engine.engine import Engine
from llama_tp.engine.runner import ModelRunner
from llama_tp.parallel.apply import local_kv_heads
from llama_tp.parallel.launch import Group
from llama_tp.parallel.plan import num_parameters_of_rank

log = logging.getLogger(__name__)


def load_engine(folder: str, args: ModelArgs, config: EngineConfig, group: Group) -> Engine:
    """This rank's engine. ValueError, on every rank, for a checkpoint that is damaged or another model's, for too
    little memory, and for whatever else goes wrong on any rank."""
    start = monotonic()
    if group.device.type == "cuda":
        torch.cuda.set_device(group.device)  # of this thread: joining may have been another's work
    dtype = agree(lambda: resolve_dtype(config.dtype, folder, group.device, config.max_batch_size))
    # Ranks may have different amounts of free memory, but one scheduler plans for all.
    pages = min(gather(agree(lambda: num_pages_that_fit(args, config, group, dtype))))
    config = replace(config, cache_pages=pages)
    model = load_model(folder, args, group, dtype, verify_files=config.verify_checkpoint)
    num_kv_heads = local_kv_heads(args, group.comm.size)
    runner = agree(lambda: ModelRunner(model, config, num_kv_heads=num_kv_heads, dtype=dtype, device=group.device))
    if group.comm.is_leader:
        log.info(
            "loaded in %.1f s: %d ranks, %s, %s, %d threads a rank; KV cache of %d tokens (%.1f sequences of "
            "max_seq_len=%d), %.0f MiB a rank",
            monotonic() - start,
            group.comm.size,
            group.device.type,
            str(dtype).removeprefix("torch."),
            torch.get_num_threads(),
            config.cache_tokens,
            config.num_pages / config.pages_per_sequence,
            config.max_seq_len,
            runner.cache.nbytes / 2**20,
        )
    return Engine(runner, group.comm, config)


def num_pages_that_fit(args: ModelArgs, config: EngineConfig, group: Group, dtype: torch.dtype) -> int:
    """Pages of KV cache that this rank is to have. ValueError if they exceed the memory that is free beside the
    weights, before any of it is taken."""
    available = _free_memory(group.device)
    weights = num_parameters_of_rank(args, group.comm.size) * dtype.itemsize
    kv_heads = local_kv_heads(args, group.comm.size)
    page = 2 * args.n_layers * config.page_size * kv_heads * args.head_dim * dtype.itemsize
    if config.kv_cache_memory is None:
        pages = config.num_pages
    else:
        pages = _bytes_of_cache(config, available, weights) // page
        if pages < config.pages_per_sequence:
            raise ValueError(
                f"kv_cache_memory={config.kv_cache_memory!r} holds {pages * config.page_size} tokens on a rank, not "
                f"one sequence of max_seq_len={config.max_seq_len}; raise the one or lower the other"
            )
    if available is None or weights + pages * page <= available:
        return pages
    fitting = max(0, (available - weights) // (config.pages_per_sequence * page))
    remedy = f"lower max_batch_size to {fitting}, or max_seq_len" if fitting else "use more ranks, or lower max_seq_len"
    what = f"max_batch_size={config.max_batch_size} sequences of max_seq_len={config.max_seq_len} need"
    if config.kv_cache_memory is not None:
        what, remedy = f"kv_cache_memory={config.kv_cache_memory!r} asks for", "lower it, or give a share such as 0.9"
    if config.dtype == "auto" and dtype == torch.float32:
        remedy += "; or set dtype to bfloat16, which halves the weights"
    raise ValueError(
        f"{what} {pages * page / 2**30:.1f} GiB of KV cache beside {weights / 2**30:.1f} GiB of weights on each rank, "
        f"but {available / 2**30:.1f} GiB are free; {remedy}"
    )


def _bytes_of_cache(config: EngineConfig, available: int | None, weights: int) -> int:
    """What kv_cache_memory comes to on this rank."""
    assert config.kv_cache_memory is not None
    memory = parse_memory(config.kv_cache_memory)
    if isinstance(memory, int):
        return memory
    if available is None:
        raise ValueError(f"kv_cache_memory={memory}: this system does not tell how much memory is free; give bytes")
    return int(max(0, available - weights) * memory)


def _free_memory(device: torch.device) -> int | None:
    """Bytes that this rank can have: of its GPU, or its share of the host's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        return None
    return int(found[1]) * 1024 // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if found else None
