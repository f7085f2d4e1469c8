"""Linear layers with quantized weights.

CPUs have kernels for int8 and int4 in bfloat16, which read the weights as they are: decode is bound by reading. There,
other forms and dtypes are widened once, to a dense layer. On GPUs weights stay as they are, and are widened for each
product. (Measured: docs/performance.md.)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llama_tp.model.linear import DenseLinear, Linear
from llama_tp.model.quantization import QuantizedWeight, dequantize, unpack_nibbles
from llama_tp.model.weights import GROUP, PACKED, ROW_BLOCK, STORED, Layout

_PIECE = {"cpu": 1 << 18, "cuda": 1 << 26}
"""Elements widened at a time: few enough for a core's cache; as many as fill a GPU."""
_PACKED_ROWS = 1 << 10
"""Rows packed at a time: a multiple of the kernel's blocks, and not too many, since an element takes 4 bytes there."""
_MAX_KERNEL_TOKENS = 128
"""Up to this many tokens the int8 kernel, whose time is proportional to their number, is faster than to widen."""


def quantized_linear(
    weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype, layout: Layout = PACKED
) -> Linear:
    """The layer for inputs in `dtype`, on the weight's device."""
    if weight.weight.device.type != "cpu":
        return QuantizedLinear(weight, bias)
    if dtype != torch.bfloat16:
        return DenseLinear(dequantize(weight, dtype), bias, layout)
    if layout == STORED:
        return QuantizedLinear(weight, bias)
    layer = _packed(weight, bias)
    return layer if layout == PACKED else TwofoldLinear(layer, weight)


def _packed(weight: QuantizedWeight, bias: Tensor | None) -> Linear:
    if weight.form == "int8":
        return Int8Linear(weight, bias)
    if weight.form == "int4":
        return Int4Linear(weight, bias)
    return DenseLinear(dequantize(weight, torch.bfloat16), bias)


def for_pytorch(layer: Linear) -> Linear:
    """The same layer, laid out for PyTorch's kernels."""
    if isinstance(layer, TwofoldLinear):
        return layer.packed
    if isinstance(layer, DenseLinear):
        layer.pack()
    elif isinstance(weight := layer.stored(), QuantizedWeight) and weight.weight.device.type == "cpu":
        return _packed(weight, layer.bias)
    return layer


class QuantizedLinear(Linear):
    """The product with the dequantized matrix, on any device and in any dtype. Takes ownership of the tensors."""

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None = None) -> None:
        super().__init__(*weight.shape, bias)
        self._weight = weight
        self._rows = max(1, _PIECE[weight.weight.device.type] // self.in_features)

    @property
    def num_bytes(self) -> int:
        return self._weight.num_bytes + _size_of(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        out = x.new_empty(*x.shape[:-1], self.out_features)
        for start in range(0, self.out_features, self._rows):
            length = min(self._rows, self.out_features - start)
            piece = dequantize(self._weight.rows(start, length), x.dtype)
            bias = None if self.bias is None else self.bias[start : start + length]
            out[..., start : start + length] = F.linear(x, piece, bias)
        return out

    def stored(self) -> QuantizedWeight:
        return self._weight

    def dense_weight(self) -> Tensor:
        return dequantize(self._weight, torch.float32)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, form={self._weight.form}"


class TwofoldLinear(Linear):
    """A layer for PyTorch's kernels that also keeps the weight as it is stored, for kernels that are being compiled."""

    def __init__(self, packed: Linear, weight: QuantizedWeight) -> None:
        super().__init__(*weight.shape, packed.bias)
        self.packed = packed
        self._weight = weight

    @property
    def num_bytes(self) -> int:
        return self.packed.num_bytes + self._weight.num_bytes

    def forward(self, x: Tensor) -> Tensor:
        return self.packed(x)

    def stored(self) -> QuantizedWeight:
        return self._weight

    def dense_weight(self) -> Tensor:
        return self.packed.dense_weight()


class Int8Linear(Linear):
    """int8 on a CPU, for x (T, in) in bfloat16. Scales are rounded to bfloat16."""

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None = None) -> None:
        super().__init__(*weight.shape, bias)
        self._weight = weight.weight
        self._scales = weight.scales.squeeze(1).bfloat16()

    @property
    def num_bytes(self) -> int:
        return self._weight.nbytes + self._scales.nbytes + _size_of(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        if x.size(0) > _MAX_KERNEL_TOKENS:
            return self._widened(x)
        out = torch.ops.aten._weight_int8pack_mm(x, self._weight, self._scales)
        return out if self.bias is None else out + self.bias

    def _widened(self, x: Tensor) -> Tensor:
        return QuantizedLinear(self._quantized(), self.bias)(x)

    def _quantized(self) -> QuantizedWeight:
        return QuantizedWeight(self._weight, self._scales.float().unsqueeze(1))

    def dense_weight(self) -> Tensor:
        return dequantize(self._quantized(), torch.float32)


class Int4Linear(Linear):
    """int4 on a CPU, for x (T, in) in bfloat16. Scales and offsets are rounded to bfloat16.

    The kernel computes (q - 8) * scale + zero, and has a layout of its own that depends on the CPU.
    """

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None = None) -> None:
        super().__init__(*weight.shape, bias)
        assert weight.offsets is not None
        padding = -self.out_features % ROW_BLOCK
        scales, zeros = weight.scales.float(), weight.offsets.float() + 8 * weight.scales.float()
        self._scales_and_zeros = F.pad(torch.stack((scales, zeros), dim=-1), (0, 0, 0, 0, 0, padding))
        self._scales_and_zeros = self._scales_and_zeros.transpose(0, 1).contiguous().bfloat16()  # (in / 32, out, 2)
        blocks = F.pad(weight.weight, (0, 0, 0, padding)).split(_PACKED_ROWS)
        pack = torch.ops.aten._convert_weight_to_int4pack_for_cpu
        self._weight = torch.cat([pack(unpack_nibbles(block).int(), 2) for block in blocks])

    @property
    def num_bytes(self) -> int:
        return self._weight.nbytes + self._scales_and_zeros.nbytes + _size_of(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.ops.aten._weight_int4pack_mm_for_cpu(x, self._weight, GROUP, self._scales_and_zeros)
        out = out[:, : self.out_features]
        return out if self.bias is None else out + self.bias

    def dense_weight(self) -> Tensor:
        # Each element is multiplied by 1 and added to zeros, exactly.
        identity = torch.eye(self.in_features, dtype=torch.bfloat16)
        out = torch.ops.aten._weight_int4pack_mm_for_cpu(identity, self._weight, GROUP, self._scales_and_zeros)
        return out[:, : self.out_features].t().contiguous()


def _size_of(bias: Tensor | None) -> int:
    return 0 if bias is None else bias.nbytes
