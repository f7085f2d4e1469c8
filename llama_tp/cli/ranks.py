"""`--tp`: how many ranks a command runs on, and torchrun to start them."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llama_tp.model_args import ModelArgs

AUTO = "auto"


def resolve_size(tp: int | str, model: str | ModelArgs, device: str) -> int:
    """The number of ranks that `--tp` asks for. ValueError if the model cannot run on it.

    `model`: an architecture, or the folder of a converted checkpoint.
    """
    from llama_tp.model_args import ModelArgs
    from llama_tp.parallel.sharding import check_tp_size
    from llama_tp.planning.local import automatic_size

    if tp != AUTO and (isinstance(tp, bool) or not isinstance(tp, int) or tp < 1):
        raise ValueError(f"tp={tp!r} must be an integer of at least 1, or {AUTO}")
    args = ModelArgs.load_converted(Path(model, "model_args.json")) if isinstance(model, str) else model
    if isinstance(tp, str):
        return automatic_size(args.n_heads, 0 if device == "cpu" else _num_gpus())
    check_tp_size(args, tp)
    return tp


def run_on_ranks(tp: int | str | None, model: str | ModelArgs, device: str) -> None:
    """Continue this command on `tp` ranks: replaces this process with torchrun, which runs the same command line.

    Returns if this process is to run the command itself: it is one of the ranks, or one rank is enough. `tp`: a number,
    or auto; None: as started. `model`: as of `resolve_size`. ValueError if torchrun has started another number of
    ranks.
    """
    if tp is None:
        return
    size = resolve_size(tp, model, device)
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if "TORCHELASTIC_RUN_ID" in os.environ:
        if tp != AUTO and started != size:
            raise ValueError(f"tp={tp}, but torchrun has started {started} ranks; leave --tp out")
        return
    if size > 1:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun sets it, with a warning; ranks ignore it
        os.execv(sys.executable, _torchrun(size))


def _torchrun(size: int) -> list[str]:
    """The command line that runs this one on several ranks. Nothing leaves loopback, and no port is fixed."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    return [sys.executable, *torchrun, "--nproc-per-node", str(size), "-m", "llama_tp", *sys.argv[1:]]


def _num_gpus() -> int:
    import torch

    return torch.cuda.device_count()
