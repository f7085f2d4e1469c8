"""One rank of the collectives' test.

Usage: torchrun ... -m tests.distributed.comm_worker {shared|gloo|ordered|shared plans}
"""

from __future__ import annotations

import sys
import time

import torch

from llama_tp.parallel import shared_memory
from llama_tp.parallel.comm import GroupComm, PeerLost
from llama_tp.parallel.launch import join, leave


def main() -> None:
    comm = join("cpu", timeout_s=2).comm
    assert isinstance(comm, shared_memory.SharedMemoryComm)
    if sys.argv[1] in ("gloo", "ordered"):
        comm = GroupComm(leader=0, timeout_s=2, ordered=sys.argv[1] == "ordered")
    elif sys.argv[1] == "shared plans":  # what ranks on one host's GPUs use, with gloo for NCCL
        comm = GroupComm(leader=0, timeout_s=2, plans=comm)
    ranks = range(comm.size)
    for dtype in (torch.float32, torch.bfloat16):
        for count in (1, 577, 3_000_000):  # the last one is larger than a slot
            mine = [torch.arange(count).remainder(97).add(rank).to(dtype) for rank in ranks]
            total = comm.all_reduce(mine[comm.rank].clone())
            torch.testing.assert_close(total.float(), sum(x.float() for x in mine), atol=0, rtol=0.01)
        if sys.argv[1] in (
            "shared",
            "ordered",
        ):  # gloo's order of addition depends on the size: a row is the same in any company
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
    start = time.monotonic()
    if comm.is_leader:
        time.sleep(4)  # silent for longer than the timeout
        leave()
    try:
        comm.publish(None)
    except PeerLost as error:
        assert 1.9 < time.monotonic() - start < 3.5, time.monotonic() - start
        print(f"noticed: {error}\n", end="")
        leave()
    raise AssertionError("nobody noticed that the leader is silent")


if __name__ == "__main__":
    main()
