"""A checkpoint and a group of ranks -> an Engine that is ready to run."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from time import monotonic

import torch

from llama_tp.checkpoint.agree import agree
from llama_tp.checkpoint.load import load_model, resolve_dtype
from llama_tp.config import EngineConfig, ModelArgs
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
    dtype = agree(lambda: resolve_dtype(config.dtype, folder, group.device))
    agree(lambda: check_memory(args, config, group, dtype))
    model = load_model(folder, args, group, dtype)
    num_kv_heads = local_kv_heads(args, group.comm.size)
    runner = agree(lambda: ModelRunner(model, config, num_kv_heads=num_kv_heads, dtype=dtype, device=group.device))
    if group.comm.is_leader:
        log.info(
            "loaded in %.1f s: %d ranks, %s, %s, %d threads a rank; KV cache of %d tokens, %.0f MiB a rank",
            monotonic() - start,
            group.comm.size,
            group.device.type,
            str(dtype).removeprefix("torch."),
            torch.get_num_threads(),
            config.num_pages * config.page_size,
            runner.cache.nbytes / 2**20,
        )
    return Engine(runner, group.comm, config)


def check_memory(args: ModelArgs, config: EngineConfig, group: Group, dtype: torch.dtype) -> None:
    """ValueError if weights and KV cache of this rank exceed the memory that is free, before any of it is taken."""
    available = _free_memory(group.device)
    weights = num_parameters_of_rank(args, group.comm.size) * dtype.itemsize
    kv_heads = local_kv_heads(args, group.comm.size)
    of_one = (
        2 * args.n_layers * config.pages_per_sequence * config.page_size * kv_heads * args.head_dim * dtype.itemsize
    )
    if available is None or weights + config.max_batch_size * of_one <= available:
        return
    fitting = max(0, (available - weights) // of_one)
    remedy = f"lower max_batch_size to {fitting}, or max_seq_len" if fitting else "use more ranks, or lower max_seq_len"
    raise ValueError(
        f"max_batch_size={config.max_batch_size} sequences of max_seq_len={config.max_seq_len} need "
        f"{config.max_batch_size * of_one / 2**30:.1f} GiB of KV cache beside {weights / 2**30:.1f} GiB of weights on "
        f"each rank, but {available / 2**30:.1f} GiB are free; {remedy}"
    )


def _free_memory(device: torch.device) -> int | None:
    """Bytes that this rank can have: of its GPU, or its share of the host's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        return None
    return int(found[1]) * 1024 // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if found else None
