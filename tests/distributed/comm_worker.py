"""One rank of the collectives' test.

Usage: torchrun ... -m tests.distributed.comm_worker {shared|gloo|ordered|shared plans}
"""

from __future__ import annotations

import sys
import time

import torch
import torch.distributed as dist

from llama_tp.parallel.comm import Comm, GroupComm, PeerLost
from llama_tp.parallel.launch import exit_rank, join
from llama_tp.parallel.shared_memory import SharedMemoryComm


def make(kind: str, timeout_s: float) -> Comm:
    if kind == "shared":
        return SharedMemoryComm(leader=0, timeout_s=timeout_s)
    # "shared plans": what ranks on one host's GPUs use, with gloo for NCCL
    plans = SharedMemoryComm(leader=0, timeout_s=timeout_s) if kind == "shared plans" else None
    return GroupComm("gloo", leader=0, timeout_s=timeout_s, ordered=kind == "ordered", plans=plans)


def main() -> None:
    kind = sys.argv[1]
    assert isinstance(join("cpu").comm, SharedMemoryComm), "what ranks on one host get"
    comm = make(kind, timeout_s=60)
    ranks = range(comm.size)
    for dtype in (torch.float32, torch.bfloat16):
        for count in (1, 577, 3_000_000):  # the last one is larger than a slot
            mine = [torch.arange(count).remainder(97).add(rank).to(dtype) for rank in ranks]
            total = comm.all_reduce(mine[comm.rank].clone())
            torch.testing.assert_close(total.float(), sum(x.float() for x in mine), atol=0, rtol=0.01)
        if kind in ("shared", "ordered"):  # gloo's order of addition depends on the size; here a row has no company
            rows = torch.randn(64, 100, generator=torch.Generator().manual_seed(comm.rank)).to(dtype)
            together = comm.all_reduce(rows.clone())
            alone = torch.cat([comm.all_reduce(row.clone()) for row in rows.split(1)])
            assert torch.equal(together, alone)
        for shape in ((1, 5), (3, 70_000), (9, 200_000)):
            mine = [torch.full(shape, rank + 1).to(dtype) for rank in ranks]
            gathered = comm.gather(mine[comm.rank])
            assert (gathered is None) != comm.is_leader
            if gathered is not None:
                assert torch.equal(gathered, torch.cat(mine, dim=-1))
    for number in range(300):  # plans of changing length, faster than followers may read them
        message = bytes([number % 251]) * (1 + number * 37 % 9000)
        assert comm.publish(message if comm.is_leader else None) == message
    for size in (2**20 - 9, 2**20 - 8, 2**20 - 7, 2**21 - 8, 5_000_000):  # about and over the size of a slot
        message = bytes(range(251)) * (size // 251) + bytes(size % 251)
        assert comm.publish(message if comm.is_leader else None) == message
    comm = make(kind, timeout_s=2)
    assert comm.publish(b"begin" if comm.is_leader else None) == b"begin"
    start = time.monotonic()
    if not comm.is_leader:
        try:
            comm.publish(None)
        except PeerLost as error:
            print(f"noticed: {error}\n", end="")
        else:
            raise AssertionError("nobody noticed that the leader is silent")
        elapsed = time.monotonic() - start
        assert elapsed < 20, elapsed  # 2, and what this machine needs
        if isinstance(comm, SharedMemoryComm):  # with gloo, the first to notice breaks the others' connections
            assert elapsed > 1.9, elapsed
    dist.barrier()  # in a group of its own: the leader is silent until the last one is here
    exit_rank()


if __name__ == "__main__":
    main()
