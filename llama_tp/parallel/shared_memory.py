"""Collectives of one host's CPU ranks over shared memory: about 10 us, against 200 for gloo.

Every rank owns an epoch counter and two data slots in one mapped file. Operation s uses slot s % 2; a rank announces it
by storing s in its counter. A rank enters operation s only when all counters have reached s - 1. A rank that has
reached s - 1 is done with s - 2, so no slot is overwritten while another rank reads it.

A waiting rank polls the counter for a few microseconds, then yields its core between polls, then sleeps on a futex.
Polling is best with a core per rank, yielding with fewer cores (waking takes 50 us on a virtual machine), and sleeping
makes an idle follower free.

All ranks sum in rank order, so results are bit-identical everywhere. A plain counter suffices because stores become
visible in program order on x86-64; other processors use gloo.
"""

from __future__ import annotations

import ctypes
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
from llama_tp.threads import available_cores

_LINE = 64  # bytes of a cache line; one counter per line
_SLOT = 1 << 20  # bytes of a data slot; larger tensors are sent in pieces
_DTYPES = (torch.uint8, torch.bfloat16, torch.float16, torch.float32)
_SPINS = 300  # polls of a counter, about 20 us; a tenth of that if ranks share cores
_YIELDS = 1000  # polls with sched_yield in between
_NAP_S = 0.002  # longest sleep, and so the cost of a missed wake-up (see _announce)
_IDLE_NAP_S = 0.05  # longest sleep after waiting for _IDLE_S
_IDLE_S = 0.1
_SYS_FUTEX, _FUTEX_WAIT, _FUTEX_WAKE = 202, 0, 1  # on x86-64
_EVERYBODY = 2**31 - 1


def is_supported() -> bool:
    """Whether this machine has the required memory model and /dev/shm."""
    return platform.machine() in ("x86_64", "AMD64") and os.access("/dev/shm", os.W_OK)


class SharedMemoryComm:
    """See `llama_tp.parallel.comm.Comm`. Setup needs an initialized process group of one host's ranks."""

    def __init__(self, *, leader: int, timeout_s: float) -> None:
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        self.leader = leader
        self.is_leader = self.rank == leader
        self._timeout_s = timeout_s
        self._epoch = 0
        mapping = _map_together(_LINE * self.size + 2 * self.size * _SLOT, leader)
        # In each rank's cache line, word 0 is the counter and word 1 is set while the rank sleeps.
        self._counters = memoryview(mapping).cast("q")
        base = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
        self._addresses = [ctypes.c_void_p(base + _LINE * rank) for rank in range(self.size)]
        self._spins = _SPINS if available_cores() >= self.size * torch.get_num_threads() else _SPINS // 10
        self._syscall = ctypes.CDLL(None).syscall
        self._bytes = memoryview(mapping)[_LINE * self.size :]
        slots = torch.frombuffer(mapping, dtype=torch.uint8, offset=_LINE * self.size).view(2, self.size, _SLOT)
        self._slots = {dtype: slots.view(dtype) for dtype in _DTYPES}

    def all_reduce(self, x: Tensor) -> Tensor:
        pieces = x.view(-1).split(_SLOT // x.element_size())
        sums = [torch.sum(self._exchange(piece), dim=0, dtype=torch.float32) for piece in pieces]
        return (sums[0] if len(sums) == 1 else torch.cat(sums)).view(x.shape)

    def gather(self, x: Tensor) -> Tensor | None:
        width = x.size(-1)
        flat = x.reshape(-1, width)
        out = x.new_empty(flat.size(0), self.size, width) if self.is_leader else None
        for start, piece in _pieces(flat, max(1, _SLOT // (width * x.element_size()))):
            slots = self._exchange(piece.reshape(-1), wait=self.is_leader)
            if out is not None:
                out[start : start + piece.size(0)] = slots.view(self.size, -1, width).transpose(0, 1)
        return None if out is None else out.view(*x.shape[:-1], -1)

    def publish(self, message: bytes | None) -> bytes:
        if message is not None:
            framed = len(message).to_bytes(8, "little") + message
            for start in range(0, len(framed), _SLOT):
                piece = framed[start : start + _SLOT]
                self._enter()
                at = self._leader_offset()
                self._bytes[at : at + len(piece)] = piece
                self._announce()
            return message
        head = self._receive(_SLOT, framed=True)
        length = 8 + int.from_bytes(head[:8], "little")
        pieces = [head, *(self._receive(length - start) for start in range(_SLOT, length, _SLOT))]
        return b"".join(pieces)[8:]

    def close(self) -> None:
        dist.destroy_process_group()

    def _receive(self, size: int, *, framed: bool = False) -> bytes:
        """The leader's next piece: up to a slot of `size` bytes, or of the size given by its frame header."""
        self._enter()
        self._wait(self.leader, self._epoch)
        at = self._leader_offset()
        if framed:
            size = 8 + int.from_bytes(self._bytes[at : at + 8], "little")
        data = bytes(self._bytes[at : at + min(size, _SLOT)])
        self._announce()
        return data

    def _leader_offset(self) -> int:
        """Offset of the leader's bytes in this operation."""
        return (self._epoch % 2 * self.size + self.leader) * _SLOT

    def _exchange(self, x: Tensor, *, wait: bool = True) -> Tensor:
        """Share x (n,) with the group. Returns all ranks' values (ranks, n), complete if this rank waits for them."""
        self._enter()
        slots = self._slots[x.dtype][self._epoch % 2, :, : x.numel()]
        slots[self.rank] = x
        self._announce()
        if wait:
            for rank in range(self.size):
                self._wait(rank, self._epoch)
        return slots

    def _enter(self) -> None:
        """Begin the next operation: its slots are free once all ranks have reached the previous one."""
        for rank in range(self.size):
            self._wait(rank, self._epoch)
        self._epoch += 1

    def _announce(self) -> None:
        counters, words = self._counters, _LINE // 8
        counters[self.rank * words] = self._epoch
        # These reads may be reordered before that write; a rank that falls asleep in between sleeps for one nap.
        if any(counters[rank * words + 1] for rank in range(self.size)):
            self._syscall(_SYS_FUTEX, self._addresses[self.rank], _FUTEX_WAKE, _EVERYBODY, None, None, 0)

    def _wait(self, rank: int, epoch: int) -> None:
        counters, index = self._counters, rank * _LINE // 8
        for _ in range(self._spins):
            if counters[index] >= epoch:
                return
        for _ in range(_YIELDS):
            os.sched_yield()
            if counters[index] >= epoch:
                return
        asleep = self.rank * _LINE // 8 + 1
        counters[asleep] = 1
        start = time.monotonic()
        while (seen := counters[index]) < epoch:
            waited = time.monotonic() - start
            if waited > self._timeout_s:
                raise PeerLost(f"rank {rank} was silent for {self._timeout_s:g} s")
            nap = _TimeSpec(0, int(1e9 * (_NAP_S if waited < _IDLE_S else _IDLE_NAP_S)))
            low_word = ctypes.c_uint32(seen & 0xFFFFFFFF)
            self._syscall(_SYS_FUTEX, self._addresses[rank], _FUTEX_WAIT, low_word, ctypes.byref(nap), None, 0)
        counters[asleep] = 0


class _TimeSpec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


def _pieces(x: Tensor, step: int) -> Iterator[tuple[int, Tensor]]:
    for start in range(0, x.size(0), step):
        yield start, x[start : start + step]


def _map_together(size: int, leader: int) -> mmap.mmap:
    """Map one new zeroed file on every rank, unlinked when this returns. OSError on all ranks or on none."""
    name: list[str | None] = [None]
    mapping = problem = None
    try:
        if dist.get_rank() == leader:
            name[0] = _new_file(size)
    except OSError as error:
        problem = str(error)
    dist.broadcast_object_list(name, src=leader)
    try:
        if name[0] is not None:
            with open(name[0], "r+b") as file:
                mapping = mmap.mmap(file.fileno(), size)
    except OSError as error:
        problem = str(error)
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    if dist.get_rank() == leader and name[0] is not None:
        os.unlink(name[0])
    if first := next(filter(None, problems), None):
        raise OSError(f"cannot allocate {size} bytes of shared memory: {first}")
    assert mapping is not None
    return mapping


def _new_file(size: int) -> str:
    descriptor, path = tempfile.mkstemp(prefix="llama_tp.", dir="/dev/shm")
    try:
        os.posix_fallocate(descriptor, 0, size)  # ENOSPC here, not SIGBUS later
    except OSError:
        os.unlink(path)
        raise
    finally:
        os.close(descriptor)
    return path
