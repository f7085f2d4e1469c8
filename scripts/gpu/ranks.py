"""Groups of ranks on one GPU: a rank without its GPU, two ranks that share it, and NCCL with a single rank."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch

from gpu.child import run_child
from gpu.models import agreement, write_random_checkpoint
from gpu.report import Report
from gpu.start import ALONE_ON_CPU
from gpu.workers import CASES, NEW_TOKENS, generate, label
from llama_tp.model_args import ModelArgs


def ranks(r: Report, options: list[str]) -> None:
    """Two ranks, the second without a GPU: every rank must learn of it within seconds."""
    one_gpu = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]}
    found = run_child(r, "ranks", options, num_ranks=2, env=one_gpu)
    heard = [found.get(f"rank {rank} heard", {}).get("what") for rank in range(2)]
    is_right = heard[0] == heard[1] and str(heard[0]).startswith("rank 1: device=cuda")
    r.expect("both ranks heard that rank 1 has no GPU", is_right, heard)


def tp2(r: Report, options: list[str], checkpoint: str | None) -> None:
    """Two ranks on one GPU, over gloo because NCCL refuses that, against one rank on the CPU in float32."""
    with tempfile.TemporaryDirectory(prefix="gpu_check.") as folder:
        if checkpoint is None:
            args = ModelArgs(dim=64, n_layers=2, n_heads=8, n_kv_heads=4, vocab_size=512, multiple_of=16)
            write_random_checkpoint(Path(folder), args, torch.float32)
            checkpoint = folder
        expected = generate(checkpoint, ALONE_ON_CPU, "float32")
        found = run_child(r, "tp2", [*options, "--checkpoint", checkpoint], num_ranks=2)
    for dtype, deterministic in CASES:
        name = label(dtype, deterministic)
        got = found.get(name) or []
        shown = {f"of {NEW_TOKENS}": agreement(got, expected)}
        if dtype == "float32":
            r.expect(f"{name}: as on one CPU rank", got == expected, shown)
        else:
            r.put(f"{name}: as on one CPU rank", shown)


def nccl(r: Report, options: list[str]) -> None:
    """The collectives of a step over NCCL, and a device mesh, in a group of one rank."""
    found = run_child(r, "nccl", options)
    is_right = {"sum": 32.0, "gathered": [4, 8], "published": 10000}
    r.expect("collectives", found.get("results") == is_right, found.get("results"))
