"""A checkpoint and a group of ranks -> an Engine that is ready to run."""

from __future__ import annotations

import logging
from time import monotonic

import torch

from llama_tp.checkpoint.load import load_model, resolve_dtype
from llama_tp.config import EngineConfig, ModelArgs
from llama_tp.engine.engine import Engine
from llama_tp.engine.runner import ModelRunner
from llama_tp.parallel.apply import local_kv_heads
from llama_tp.parallel.launch import Group

log = logging.getLogger(__name__)


def load_engine(folder: str, args: ModelArgs, config: EngineConfig, group: Group) -> Engine:
    """This rank's engine. ValueError, on every rank, for a checkpoint that is damaged or another model's."""
    start = monotonic()
    dtype = resolve_dtype(config.dtype, folder, group.device)
    model = load_model(folder, args, group, dtype)
    runner = ModelRunner(
        model, config, num_kv_heads=local_kv_heads(args, group.comm.size), dtype=dtype, device=group.device
    )
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
