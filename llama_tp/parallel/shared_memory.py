"""The collectives of one host's CPU ranks over shared memory: about 10 us where gloo takes 200.

Every rank owns an epoch counter and two data slots in one mapped file. Operation number s uses slot s % 2 and is
announced by storing s into the counter. A rank enters operation s only when all counters have reached s - 1; arrival
at s - 1 means being done with s - 2, so nobody can overwrite what another still reads.

All ranks sum in rank order, so the result is equal to the bit everywhere. Stores become visible in program order
on x86-64, which is what makes a plain counter enough; other processors use gloo.
"""

from __future__ import annotations

import mmap
import os
import platform
import tempfile
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from llama_tp.parallel.comm import PeerLost

_LINE = 64  # bytes of a cache line: one counter each
_SLOT = 1 << 20  # bytes of a data slot; larger tensors travel in pieces
_DTYPES = (torch.uint8, torch.bfloat16, torch.float16, torch.float32)
_SPINS = 300  # looks at a counter before the core is offered to others
_YIELD_S = 0.002  # of offering before the rank sleeps between looks: an idle follower must not burn a core
_NAP_S = 0.0005


def is_supported() -> bool:
    """Whether this machine's memory model and file system allow it."""
    return platform.machine() in ("x86_64", "AMD64") and os.access("/dev/shm", os.W_OK)


class SharedMemoryComm:
    """See `llama_tp.parallel.comm.Comm`. Needs an initialised process group of one host's ranks to set up."""

    def __init__(self, *, leader: int, timeout_s: float) -> None:
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        self.leader = leader
        self.is_leader = self.rank == leader
        self._timeout_s = timeout_s
        self._epoch = 0
        mapping = _map_together(_LINE * self.size + 2 * self.size * _SLOT, leader)
        self._counters = memoryview(mapping).cast("q")
        slots = torch.frombuffer(mapping, dtype=torch.uint8, offset=_LINE * self.size).view(2, self.size, _SLOT)
        self._slots = {dtype: slots.view(dtype) for dtype in _DTYPES}

    def all_reduce(self, x: Tensor) -> Tensor:
        for piece in x.view(-1).split(_SLOT // x.element_size()):
            torch.sum(self._exchange(piece), dim=0, out=piece)
        return x

    def gather(self, x: Tensor) -> Tensor | None:
        width = x.size(-1)
        rows = x.reshape(-1, width)
        out = x.new_empty(rows.size(0), self.size, width) if self.is_leader else None
        for start, piece in _pieces(rows, max(1, _SLOT // (width * x.element_size()))):
            slots = self._exchange(piece.reshape(-1), wait=self.is_leader)
            if out is not None:
                out[start : start + piece.size(0)] = slots.view(self.size, -1, width).transpose(0, 1)
        return None if out is None else out.view(*x.shape[:-1], -1)

    def publish(self, message: bytes | None) -> bytes:
        self._enter()
        slot = self._slots[torch.uint8][self._epoch % 2, self.leader]
        if message is not None:
            framed = bytearray(len(message).to_bytes(8, "little") + message)
            assert len(framed) <= _SLOT, "a plan is bounded by max_batched_tokens and fits a slot"
            slot[: len(framed)] = torch.frombuffer(framed, dtype=torch.uint8)
        else:
            self._wait(self.leader, self._epoch)
            length = int.from_bytes(slot[:8].numpy().tobytes(), "little")
            message = slot[8 : 8 + length].numpy().tobytes()
        self._announce()
        return message

    def close(self) -> None:
        dist.destroy_process_group()

    def _exchange(self, x: Tensor, *, wait: bool = True) -> Tensor:
        """Show x (n,) to the group. All ranks' values (ranks, n), complete if this rank waits for them."""
        self._enter()
        slots = self._slots[x.dtype][self._epoch % 2, :, : x.numel()]
        slots[self.rank] = x
        self._announce()
        if wait:
            for rank in range(self.size):
                self._wait(rank, self._epoch)
        return slots

    def _enter(self) -> None:
        """Begin the next operation: its slots are free once everybody has arrived at the one before it."""
        for rank in range(self.size):
            self._wait(rank, self._epoch)
        self._epoch += 1

    def _announce(self) -> None:
        self._counters[self.rank * _LINE // 8] = self._epoch

    def _wait(self, rank: int, epoch: int) -> None:
        counters, index = self._counters, rank * _LINE // 8
        for _ in range(_SPINS):
            if counters[index] >= epoch:
                return
        start = time.monotonic()
        while counters[index] < epoch:
            waited = time.monotonic() - start
            if waited < _YIELD_S:
                os.sched_yield()
                time.sleep(0)  # unlike sched_yield on older Pythons, this lets other threads have the GIL
            elif waited < self._timeout_s:
                time.sleep(_NAP_S)
            else:
                raise PeerLost(f"rank {rank} was silent for {self._timeout_s:g} s")


def _pieces(rows: Tensor, step: int) -> Iterator[tuple[int, Tensor]]:
    for start in range(0, rows.size(0), step):
        yield start, rows[start : start + step]


def _map_together(size: int, leader: int) -> mmap.mmap:
    """Map one new zeroed file on every rank; its name is gone when this returns. OSError on all ranks or none."""
    name: list[str | None] = [None]
    failure = ""
    if dist.get_rank() == leader:
        try:
            descriptor, path = tempfile.mkstemp(prefix="llama_tp.", dir="/dev/shm")
            name = [path]
            os.posix_fallocate(descriptor, 0, size)  # ENOSPC here, not SIGBUS later
            os.close(descriptor)
        except OSError as error:
            failure = str(error)
            if name[0]:
                os.unlink(name[0])
            name = [None]
    dist.broadcast_object_list(name, src=leader)
    if name[0] is None:
        raise OSError(f"no shared memory of {size} bytes on the leader {failure}".rstrip())
    with open(name[0], "r+b") as file:
        mapping = mmap.mmap(file.fileno(), size)
    dist.barrier()
    if dist.get_rank() == leader:
        os.unlink(name[0])
    return mapping
