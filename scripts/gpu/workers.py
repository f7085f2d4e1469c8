"""The ranks of sections ranks, tp2 and nccl. Imports little, so that ranks start quickly."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from gpu.child import emit
from gpu.device import CUDA, DEVICE, DTYPE, SMOKE, call_us
from llama_tp.parallel import launch
from llama_tp.parallel.comm import GroupComm


def ranks() -> None:
    begin = time.monotonic()
    rank = os.environ["RANK"]
    heard = None
    try:
        if SMOKE and rank == "1":  # simulates a rank without its GPU
            with patch.object(torch.cuda, "device_count", lambda: 0):
                launch.join("cuda")
        launch.join(DEVICE.type)
    except ValueError as error:
        heard = str(error)
    emit(f"rank {rank} heard", {"after_s": round(time.monotonic() - begin, 1), "what": heard})
    launch.exit_rank()


NEW_TOKENS = 24


CASES = [(dtype, deterministic) for dtype in ("float32", "bfloat16") for deterministic in (False, True)]


def label(dtype: str, deterministic: bool) -> str:
    return f"{dtype}{', deterministic' if deterministic else ''}"


def generate(checkpoint: str, group: launch.Group, dtype: str, deterministic: bool = False) -> list[list[int]]:
    """Greedy tokens, on the leader."""
    import llama_tp
    from gpu.models import greedy, random_prompts
    from llama_tp.config import EngineConfig
    from llama_tp.model_args import ModelArgs

    args = ModelArgs.load(Path(checkpoint, "model_args.json"))
    prompts = random_prompts([4, 70, 2], args.vocab_size)
    config = EngineConfig(
        max_seq_len=256, max_batch_size=4, max_batched_tokens=32, dtype=dtype, deterministic=deterministic, threads=1
    )
    return greedy(llama_tp.load_engine(checkpoint, args, config, group), prompts, NEW_TOKENS)


def tp2(checkpoint: str) -> None:
    def over_gloo(_: str, **options: Any) -> GroupComm:
        return GroupComm("gloo", **options)

    with patch.object(launch, "resolve_device", lambda _: DEVICE), patch.object(launch, "GroupComm", over_gloo):
        group = launch.join(DEVICE.type)
    for dtype, deterministic in CASES:
        tokens = generate(checkpoint, group, dtype, deterministic)
        if group.comm.is_leader:
            emit(label(dtype, deterministic), tokens)
    dist.barrier()
    launch.exit_rank()


def nccl() -> None:
    backend = "nccl" if CUDA else "gloo"
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    if CUDA:
        torch.cuda.set_device(DEVICE)
    comm = GroupComm(backend, leader=0, timeout_s=20)
    x = torch.ones(4, 8, device=DEVICE)
    gathered = comm.gather(x)
    emit(
        "results",
        {
            "sum": comm.all_reduce(x.clone()).sum().item(),
            "gathered": None if gathered is None else list(gathered.shape),
            "published": len(comm.publish(b"x" * 10000)),
        },
    )
    row = torch.ones(1, 4096, device=DEVICE, dtype=DTYPE)
    emit("all_reduce of one token's 4096, us", round(call_us(lambda: comm.all_reduce(row)), 1))
    mesh = launch.init_device_mesh(DEVICE.type, (1,), mesh_dim_names=("tp",))
    emit("mesh", str(mesh))
    launch.exit_rank()
