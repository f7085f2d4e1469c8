"""Half precision on CPUs without instructions for it: stored as is, computed in float32."""

from __future__ import annotations

import threading
from functools import cache

import torch
from torch import Tensor


def needs_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the device is a CPU that lacks instructions for a dtype and would emulate it."""
    return device.type != "cuda" and dtype.itemsize == 2 and not _has_kernels(dtype)


@cache
def _has_kernels(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    ops = torch.ops.mkldnn
    return bool(ops._is_mkldnn_bf16_supported() if dtype == torch.bfloat16 else ops._is_mkldnn_fp16_supported())


def upcast(*tensors: Tensor) -> list[Tensor]:
    """Float32 copies of CPU tensors of any strides, for inference, valid until the next call in this thread.

    The buffer is reused and grows to the largest call: fresh memory would cost a page fault every 4 KiB.
    """
    size = sum(tensor.numel() for tensor in tensors)
    buffer: Tensor | None = getattr(_of_thread, "buffer", None)
    if buffer is None or buffer.numel() < size:
        _of_thread.buffer = None
        with torch.inference_mode(False):  # so that it can also be written outside inference mode
            buffer = _of_thread.buffer = torch.empty(size, dtype=torch.float32, device="cpu")
    parts = buffer[:size].split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape).copy_(tensor) for part, tensor in zip(parts, tensors, strict=True)]


_of_thread = threading.local()
