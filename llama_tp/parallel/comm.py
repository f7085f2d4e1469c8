"""Communication between ranks: the three collectives of a step, behind one interface.

* `all_reduce` completes a row-parallel layer, twice per layer and step.
* `gather` collects the vocabulary shards of the logits on the leader.
* `publish` sends the leader's plan, as bytes, to all ranks.

`SingleComm` is the identity. `GroupComm` uses torch.distributed: gloo on CPU, NCCL on CUDA. `SharedMemoryComm`
(shared_memory.py) replaces all three for CPU ranks on one host, and `publish` for GPU ranks on one host.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class Comm(Protocol):
    """The group, as used by the model and the engine."""

    rank: int
    """This rank in the tensor-parallel group, which is the index of its shards."""
    size: int
    is_leader: bool
    """Whether this rank decides. With several hosts the leader need not be rank 0."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over all ranks, bit-identical on all of them, in x's dtype or float32. May overwrite x."""
        ...

    def gather(self, x: Tensor) -> Tensor | None:
        """All ranks' x concatenated along the last dim, in rank order, on the leader; None elsewhere."""
        ...

    def publish(self, message: bytes | None) -> bytes:
        """The leader's message, on every rank. Followers pass None and wait; PeerLost after the timeout."""
        ...

    def close(self) -> None:
        """Release the group's resources. Call once, on every rank."""
        ...


_FRAME = 4096
"""Bytes of a plan in the first message; enough for the plan of a decode step."""


class PeerLost(RuntimeError):
    """A peer was silent for longer than the collective timeout, or its connection broke. The group is unusable."""


class SingleComm:
    """A group of one."""

    rank = 0
    size = 1
    is_leader = True

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def gather(self, x: Tensor) -> Tensor | None:
        return x

    def publish(self, message: bytes | None) -> bytes:
        assert message is not None, "a group of one has no followers"
        return message

    def close(self) -> None:
        pass


class GroupComm:
    """torch.distributed: one group of `backend` for tensors, and a gloo group for plans unless the faster `plans` is
    given, all with the timeout of a step.

    `ordered` sums in rank order, whatever the size of the tensor; an all-reduce splits it among the ranks, and sums
    each part in a different order. It transfers size / 2 times as many bytes.
    """

    def __init__(
        self, backend: str, *, leader: int, timeout_s: float, ordered: bool = False, plans: Comm | None = None
    ) -> None:
        self._plans = plans
        self._ordered = ordered
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        self.leader = leader
        self.is_leader = self.rank == leader
        # Separate groups: the default group's timeout must outlast loading a model, a step's must not.
        self._data = dist.new_group(backend=backend, timeout=timedelta(seconds=timeout_s))
        self._control = None if plans else dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))

    def all_reduce(self, x: Tensor) -> Tensor:
        if self._ordered and self.size > 2:
            parts = [torch.empty_like(x) for _ in range(self.size)]
            dist.all_gather(parts, x, group=self._data)
            return torch.stack(parts).sum(dim=0, dtype=torch.float32)
        dist.all_reduce(x, group=self._data)
        return x

    def gather(self, x: Tensor) -> Tensor | None:
        if not self.is_leader:
            dist.gather(x, dst=self.leader, group=self._data)
            return None
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.gather(x, parts, dst=self.leader, group=self._data)
        return torch.cat(parts, dim=-1)

    def publish(self, message: bytes | None) -> bytes:
        if self._plans is not None:
            return self._plans.publish(message)
        framed = b"" if message is None else len(message).to_bytes(8, "little") + message
        try:
            head = self._broadcast(framed[:_FRAME], _FRAME)
            length = 8 + int.from_bytes(head[:8], "little")
            rest = self._broadcast(framed[_FRAME:], length - _FRAME) if length > _FRAME else b""
        except RuntimeError as error:
            raise PeerLost(f"publishing a plan failed: {str(error).splitlines()[0]}") from error
        return (head + rest)[8:length]

    def _broadcast(self, data: bytes, size: int) -> bytes:
        """The leader's data, zero-padded to `size` bytes."""
        buffer = torch.frombuffer(bytearray(data.ljust(size, b"\0")), dtype=torch.uint8)
        dist.broadcast(buffer, src=self.leader, group=self._control)
        return buffer.numpy().tobytes()

    def close(self) -> None:
        dist.destroy_process_group()
