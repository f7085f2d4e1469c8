"""One rank of the determinism test: the leader checks that one request's logits are bit-identical alone and batched.

Usage: torchrun ... -m tests.distributed.deterministic_worker
"""

from __future__ import annotations

import torch

from llama_tp.config import EngineConfig
from llama_tp.engine.engine import Engine
from llama_tp.engine.runner import ModelRunner
from llama_tp.model_args import ModelArgs
from llama_tp.parallel.apply import localize, parallelize
from llama_tp.parallel.comm import Comm, GroupComm
from llama_tp.parallel.launch import Group, join
from llama_tp.parallel.sharding import local_kv_heads
from llama_tp.parallel.shared_memory import SharedMemoryComm
from tests.distributed.torchrun import exit_rank
from tests.tiny_model import random_model
from tests.watched_request import logits_of

ARGS = ModelArgs(dim=256, n_layers=2, n_heads=8, n_kv_heads=4, vocab_size=512, multiple_of=32)
SITUATIONS = [
    ({}, [[9] * 200, [1, 2, 3], list(range(100))]),
    ({"max_batched_tokens": 23}, [[9] * 150, list(range(100))]),
]


def run(group: Group, comm: Comm, dtype: torch.dtype, settings: dict, others: list[list[int]]) -> torch.Tensor | None:
    """The logits of the watched request, on the leader."""
    assert group.mesh is not None
    config = EngineConfig(**{"max_seq_len": 256, "max_batch_size": 4, **settings})
    model = localize(parallelize(random_model(ARGS).to(dtype), group.mesh), comm)
    kv_heads = local_kv_heads(ARGS, comm.size, comm.rank)
    runner = ModelRunner(model, config, num_kv_heads=kv_heads, dtype=dtype, device=group.device)
    engine = Engine(runner, comm, config)
    if not comm.is_leader:
        engine.follow()
        return None
    logits = logits_of(engine, others)
    engine.release()
    return logits


def main() -> None:
    group = join("cpu", deterministic=True)
    assert isinstance(group.comm, SharedMemoryComm)
    for comm in (group.comm, GroupComm("gloo", leader=0, timeout_s=60, ordered=True)):
        for dtype in (torch.float32, torch.bfloat16):
            alone = run(group, comm, dtype, {"deterministic": True}, [])
            is_equal, changes = [], []
            for settings, others in SITUATIONS:
                logits = run(group, comm, dtype, {"deterministic": True, **settings}, others)
                plain = run(group, comm, dtype, settings, others)
                if alone is not None and logits is not None and plain is not None:
                    is_equal.append(torch.equal(logits, alone))
                    changes.append(not torch.equal(plain, alone))
            if comm.is_leader:
                print(f"{type(comm).__name__} {dtype}: equal {is_equal}, otherwise changed {changes}\n", end="")
    exit_rank(group)


if __name__ == "__main__":
    main()
