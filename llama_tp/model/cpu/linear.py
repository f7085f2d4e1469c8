"""Linear layers of a model whose steps of few tokens the compiled kernels compute."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llama_tp.model.cpu.kernels import Kernels, linear_struct
from llama_tp.model.linear import Linear
from llama_tp.model.quantization import QuantizedWeight, dequantize

_FEW = 16
"""Tokens, such as those of a prompt that are sampled, for which weights are not worth bringing into another order."""
_PIECE = 1 << 21
"""Elements widened at a time: few enough for the last-level cache."""


class KernelLinear(Linear):
    """A layer for inputs in bfloat16 of many tokens, which kernels multiply with the weight as it is stored."""

    def __init__(self, weight: Tensor | QuantizedWeight, bias: Tensor | None, kernels: Kernels) -> None:
        rows, columns = weight.shape
        super().__init__(rows, columns, bias)
        self._weight = weight
        self._kernels = kernels
        self._float_bias = None if bias is None else bias.float()
        self._struct, self._kept = linear_struct(weight, self._float_bias)

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._kept)

    def forward(self, x: Tensor) -> Tensor:
        if x.size(0) <= _FEW:
            return self._kernels.multiply(self._weight, self._float_bias, x.float(), may_round=True).to(x.dtype)
        out = x.new_empty(x.size(0), self.out_features)
        self._kernels.multiply_batch(self._struct, x, out)
        return out

    def stored(self) -> Tensor | QuantizedWeight:
        return self._weight

    def dense_weight(self) -> Tensor:
        return self._weight if isinstance(self._weight, Tensor) else dequantize(self._weight, torch.float32)


class WidenedLinear(Linear):
    """A quantized layer, for inputs in bfloat16 of many tokens: kernels widen its weight piece by piece, and PyTorch
    multiplies."""

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None, kernels: Kernels) -> None:
        super().__init__(*weight.shape, bias)
        self._weight = weight
        self._kernels = kernels
        self._struct, self._kept = linear_struct(weight, None)
        self._rows = max(1, _PIECE // self.in_features)

    @property
    def num_bytes(self) -> int:
        return self._weight.num_bytes + (0 if self.bias is None else self.bias.nbytes)

    def forward(self, x: Tensor) -> Tensor:
        out = x.new_empty(*x.shape[:-1], self.out_features)
        wide = x.new_empty(min(self._rows, self.out_features), self.in_features)
        for start in range(0, self.out_features, self._rows):
            rows = slice(start, min(start + self._rows, self.out_features))
            piece = wide[: rows.stop - rows.start]
            self._kernels.widen(self._struct, rows, piece)
            out[..., rows] = F.linear(x, piece, None if self.bias is None else self.bias[rows])
        return out

    def stored(self) -> QuantizedWeight:
        return self._weight

    def dense_weight(self) -> Tensor:
        return dequantize(self._weight, torch.float32)
