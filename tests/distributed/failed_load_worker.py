"""One rank of which rank 1 cannot load. Usage: torchrun ... -m tests.distributed.failed_load_worker FOLDER STAGE"""

from __future__ import annotations

import sys

import torch

from llama_tp.checkpoint.load import _Loader
from llama_tp.config import EngineConfig
from llama_tp.engine import runner
from llama_tp.engine import startup as load
from llama_tp.model_args import ModelArgs
from llama_tp.parallel.launch import join
from tests.distributed.torchrun import exit_rank


def no_memory(*_args: object, **_kwargs: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def main() -> None:
    folder, stage = sys.argv[1:]
    group = join("cpu")
    if group.comm.rank == 1:
        if stage == "weights":
            _Loader._materialize = no_memory  # type: ignore[assignment, method-assign]
        elif stage == "cache":
            runner.KVCache.__init__ = no_memory  # type: ignore[method-assign]
        else:
            load.resolve_dtype = no_memory  # type: ignore[assignment]
    try:
        load.load_engine(folder, ModelArgs.load(f"{folder}/model_args.json"), EngineConfig(device="cpu"), group)
    except ValueError as error:
        # The ranks share a pipe, and torchrun runs them unbuffered: print would write the newline by itself.
        print(f"rank {group.comm.rank} heard: {error}\n", end="")
    exit_rank(group)


if __name__ == "__main__":
    main()
