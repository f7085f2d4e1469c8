"""A linear layer for inference: no bias, no gradient, the weight laid out once for the device it is on.

On CPUs oneDNN reorders a weight into blocks at every call unless it finds it in that layout already. Done once, at
load, this reads a weight 2 to 4 times as fast in decode (measured: docs/performance.md).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Module):
    """y = x W^T, where W is (out, in). Takes ownership of the weight: the caller should drop its own reference."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self._packed = can_pack(weight)
        # Not a Parameter: a packed weight has an opaque layout that nn.Module's conversions do not know.
        self._weight = (
            torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None) if self._packed else weight.detach()
        )

    def forward(self, x: Tensor) -> Tensor:
        if self._packed:
            return torch.ops.mkldnn._linear_pointwise(x, self._weight, None, "none", [], "")
        return F.linear(x, self._weight)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, packed={self._packed}"


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN has a fast kernel for this weight on this CPU.

    The operators are those that torch.compile's freezing emits; they have no public name.
    """
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.float32:
        return True
    return weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
