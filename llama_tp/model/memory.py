"""Memory for what steps read much of: weights, keys and values.

Reading it in pages of 4 KiB misses the TLB all the time; pages of 2 MiB make decoding 5 to 10 % faster (measured:
docs/performance.md). Most systems use them only where a program asks for them
(/sys/kernel/mm/transparent_hugepage/enabled: madvise).
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from contextlib import suppress
from math import prod

import torch
from torch import Tensor

HUGE_PAGE = 1 << 21
"""Bytes."""


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """As torch.empty, on CPUs in huge pages if it is large and the system has them. Python frees it with the last
    tensor that refers to it."""
    size = prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"{size} bytes cannot be allocated: {error.strerror}") from None
    with suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(tuple(shape))
