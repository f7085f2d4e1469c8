"""Half precision on CPUs that have no instructions for it: kept as it is, computed in float32."""

from __future__ import annotations

import threading
from functools import cache

import torch
from torch import Tensor


@cache
def has_kernels(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies in this dtype on this CPU at full speed."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def widen(*tensors: Tensor) -> list[Tensor]:
    """Float32 copies of tensors of any strides. The next call in this thread overwrites them.

    The memory is kept, and grows to the largest call: fresh memory would cost a page fault a page.
    """
    size = sum(tensor.numel() for tensor in tensors)
    buffer: Tensor | None = getattr(_of_thread, "buffer", None)
    if buffer is None or buffer.numel() < size:
        buffer = _of_thread.buffer = torch.empty(size)
    parts = buffer[:size].split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape).copy_(tensor) for part, tensor in zip(parts, tensors, strict=True)]


_of_thread = threading.local()
