"""Half precision on CPUs that have no instructions for it: kept as it is, computed in float32."""

from __future__ import annotations

import threading
from functools import cache

import torch
from torch import Tensor


def lacks_kernels(tensor: Tensor) -> bool:
    """Whether this CPU could multiply the tensor only by emulating its precision."""
    return not tensor.is_cuda and tensor.dtype.itemsize == 2 and not _has_kernels(tensor.dtype)


@cache
def _has_kernels(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    ops = torch.ops.mkldnn
    return bool(ops._is_mkldnn_bf16_supported() if dtype == torch.bfloat16 else ops._is_mkldnn_fp16_supported())


def widen(*tensors: Tensor) -> list[Tensor]:
    """Float32 copies of CPU tensors of any strides, for inference: the next call in this thread overwrites them.

    The memory is kept, and grows to the largest call: fresh memory would cost a page fault for every 4 KiB.
    """
    size = sum(tensor.numel() for tensor in tensors)
    buffer: Tensor | None = getattr(_of_thread, "buffer", None)
    if buffer is None or buffer.numel() < size:
        _of_thread.buffer = None
        with torch.inference_mode(False):  # so that it can be written to outside of it, too
            buffer = _of_thread.buffer = torch.empty(size, dtype=torch.float32, device="cpu")
    parts = buffer[:size].split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape).copy_(tensor) for part, tensor in zip(parts, tensors, strict=True)]


_of_thread = threading.local()
