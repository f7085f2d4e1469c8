"""Linear layers for inference: no gradients, weights laid out once for their device.

On CPUs oneDNN reorders a weight into blocks at every call unless it already has that layout. Reordering once, at load,
makes reading weights in decode 2 to 4 times as fast (measured: docs/performance.md).

A CPU without instructions for a 16-bit dtype has no kernel for it either, except for a single vector. There a weight
stays as it is, half the size of a float32 one, and every call upcasts it piece by piece, in the CPU's cache.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama_tp.model.fp32_fallback import needs_fp32, upcast
from llama_tp.model.weights import PACKED, Layout

if TYPE_CHECKING:
    from llama_tp.model.quantization import QuantizedWeight

_FP32_MIN_TOKENS = 4
"""From this many tokens, upcasting is faster than torch's kernel, whose time is proportional to their number."""
_PIECE = 1 << 20
"""Elements upcast at a time: few enough to stay in the last-level cache, enough to make calls cheap."""


class Linear(nn.Module, ABC):
    """y = x W^T + b, where W is (out, in), in a subclass's format. Most layers have no b."""

    def __init__(self, out_features: int, in_features: int, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features = out_features
        self.in_features = in_features
        # Not a Parameter: the layer is for inference only.
        self.bias = None if bias is None else bias.detach()

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """Size of weight and bias in memory."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor: ...

    def stored(self) -> Tensor | QuantizedWeight | None:
        """W as checkpoints and compiled kernels have it; None if this layer holds it in another form."""
        return None

    @abstractmethod
    def dense_weight(self) -> Tensor:
        """W as a plain matrix: for tools and tests, not for a step."""


class DenseLinear(Linear):
    """Takes ownership of the weight: the caller should drop its own reference."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None, layout: Layout = PACKED) -> None:
        super().__init__(weight.size(0), weight.size(1), bias)
        self._in_pieces = needs_fp32(weight.device, weight.dtype)
        self._packed = False
        # Not a Parameter: a packed weight has an opaque layout that nn.Module's conversions do not know.
        self._weight = weight.detach()
        if layout == PACKED:
            self.pack()

    def pack(self) -> None:
        """Lay out the weight for PyTorch's kernels, if they want another layout than the stored one."""
        if not self._packed and is_packed(self._weight.device, self._weight.dtype):
            self._weight = torch.ops.mkldnn._reorder_linear_weight(self._weight, None)
            self._packed = True

    @property
    def num_bytes(self) -> int:
        return self._weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def stored(self) -> Tensor | None:
        return None if self._packed else self._weight

    def forward(self, x: Tensor) -> Tensor:
        if self._packed:
            return torch.ops.mkldnn._linear_pointwise(x, self._weight, self.bias, "none", [], "")
        if self._in_pieces:
            return _multiply_in_pieces(x, self._weight, self.bias)
        if x.dtype == torch.float32 and is_packed(x.device, x.dtype):
            # Half as long as F.linear, which does not use oneDNN for float32.
            weight = torch.ops.mkldnn._reorder_linear_weight(self._weight, None)
            return torch.ops.mkldnn._linear_pointwise(x, weight, self.bias, "none", [], "")
        return F.linear(x, self._weight, self.bias)

    def dense_weight(self) -> Tensor:
        if not self._packed:
            return self._weight
        # A packed weight can be read only by multiplying with it: each element is multiplied by 1 and added to zeros.
        identity = torch.eye(self.in_features, dtype=self._weight.dtype)
        return torch.ops.mkldnn._linear_pointwise(identity, self._weight, None, "none", [], "").t().contiguous()

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, packed={self._packed}"


def is_packed(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a DenseLinear copies its weight into a layout of oneDNN's own.

    The operators are those that torch.compile's freezing emits; they have no public name.
    """
    is_possible = device.type == "cpu" and torch.backends.mkldnn.is_available() and not needs_fp32(device, dtype)
    return is_possible and dtype in (torch.float32, torch.bfloat16)


def _multiply_in_pieces(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b for x (T, in), added up in float32."""
    if x.size(0) == 1:
        vector = torch.mv(weight, x[0]) if bias is None else torch.addmv(bias, weight, x[0])
        return vector.unsqueeze(0)
    if x.size(0) < _FP32_MIN_TOKENS:
        return F.linear(x, weight, bias)
    num_out, num_in = weight.shape
    columns = x.float().t()
    out = x.new_empty(x.size(0), num_out)
    step = max(1, _PIECE // num_in)
    for start in range(0, num_out, step):
        rows = slice(start, start + step)
        (piece,) = upcast(weight[rows])
        product = torch.mm(piece, columns).t()
        out[:, rows] = product if bias is None else product + bias[rows]
    return out
