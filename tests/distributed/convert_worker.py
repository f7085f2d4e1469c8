"""A conversion in which something happens to one rank: convert_worker FAULT [arguments of convert]."""

from __future__ import annotations

import os
import resource
import signal
import sys

from llama_tp.checkpoint import convert as convert_module
from llama_tp.checkpoint.store.hashing_file import HashingFile
from llama_tp.cli.command import run_command


def _unreadable(*_args: object, **_options: object) -> None:
    raise ValueError("consolidated.01.pth is not readable")


def _killed(*_args: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    fault, rank = sys.argv.pop(1), os.environ["RANK"]
    if fault == f"kill rank {rank}":
        HashingFile._start_sync = _killed  # type: ignore[method-assign]
    elif fault == f"a full disk on rank {rank}":
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
    elif fault == f"an unreadable shard on rank {rank}":
        convert_module.open_checkpoint = _unreadable  # type: ignore[assignment]
    run_command(convert_module.convert)


if __name__ == "__main__":
    main()
