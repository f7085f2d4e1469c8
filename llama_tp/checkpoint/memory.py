"""Memory for tensors that follow each other: used again as soon as the last tensor in it is freed."""

from __future__ import annotations

import math
import mmap
import sys
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

_LARGE = 1 << 20
_KEPT = 2
"""A block is often still referred to while the next one is read."""
_OWN_REFERENCES = 3
"""Of memory that no tensor uses: the list's, the loop's and that of the call which counts them."""


class RecycledMemory:
    """Gives out memory of its own mappings, and keeps up to two of them for later tensors.

    malloc keeps freed blocks of up to 32 MB as well. But where sizes alternate, as those of a layer's weights do, it
    often finds no room in them, so that the process grows with the model: 60 MB for each 8 GB exported (measured).
    Returning them to the system instead costs page faults, which take longer than reading.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: list[mmap.mmap] = []

    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialized tensor."""
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes < _LARGE:
            return torch.empty(tuple(shape), dtype=dtype)
        with self._lock:
            flat = torch.frombuffer(self._memory(nbytes), dtype=dtype, count=math.prod(shape))
        return flat.view(tuple(shape))

    def _memory(self, nbytes: int) -> mmap.mmap:
        for memory in self._kept:
            if len(memory) >= nbytes and sys.getrefcount(memory) == _OWN_REFERENCES:
                return memory
        fresh = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        # One that is in use lives as long as its tensor.
        self._kept = [*sorted(self._kept, key=len)[-(_KEPT - 1) :], fresh]
        return fresh
