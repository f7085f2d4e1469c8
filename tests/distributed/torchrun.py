"""Starts a module of the tests under torchrun, the way users start ranks, and waits for all of them to leave."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import NoReturn

import torch.distributed as dist

from llama_tp.parallel import launch
from tests.paths import ROOT

TIMEOUT_S = 400.0
"""Longer than seven ranks take on the busiest machine, and less than a test may."""


def torchrun(
    nproc: int, module: str, *args: str, timeout_s: float = TIMEOUT_S, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `python -m module args` on nproc ranks, one thread each. Output is captured; the exit code is not checked."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1", "--nproc-per-node", str(nproc)]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m", module, *args]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **(env or {})}
    return subprocess.run(
        command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=timeout_s, check=False
    )


def exit_rank(group: launch.Group) -> NoReturn:
    """The end of a rank whose work is done, as all of them are."""
    if group.mesh is not None:
        dist.barrier()
    group.comm.close()
    launch.exit_rank()


def check(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
