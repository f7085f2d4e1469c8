"""Linear layers that keep their weights quantized, and widen them a few rows at a time when they multiply."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llama_tp.model.linear import Linear
from llama_tp.model.quantization import QuantizedWeight, dequantize

_PIECE = 1 << 18
"""Elements widened at a time: few enough to stay in a core's cache."""


class QuantizedLinear(Linear):
    """The product with the dequantized matrix, in the dtype of the input. Takes ownership of the tensors."""

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None = None) -> None:
        super().__init__(*weight.shape)
        self._weight = weight
        self._bias = bias

    @property
    def num_bytes(self) -> int:
        return self._weight.num_bytes + (0 if self._bias is None else self._bias.nbytes)

    def forward(self, x: Tensor) -> Tensor:
        out = x.new_empty(*x.shape[:-1], self.out_features)
        step = max(1, _PIECE // self.in_features)
        for start in range(0, self.out_features, step):
            length = min(step, self.out_features - start)
            piece = dequantize(self._weight.rows(start, length), x.dtype)
            bias = None if self._bias is None else self._bias[start : start + length]
            out[..., start : start + length] = F.linear(x, piece, bias)
        return out

    def dense_weight(self) -> Tensor:
        return dequantize(self._weight, torch.float32)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, form={self._weight.form}"
