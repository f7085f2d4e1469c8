"""Linear layers whose weights are scale * (q - zero), for integers q and zero of four bits, as GPTQ and AWQ store them.

QuantizedWeight holds scale and offset = -scale * zero instead. The product of a float16 and four bits is exact in
float32, so this loses nothing; where all zeros are 8 (symmetric quantization), offsets are exact in float16, too.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor

from llama_tp.checkpoint.formats.reader import TensorSource
from llama_tp.model.quantization import QuantizedWeight
from llama_tp.model.weights import GROUP, Form

PER_WORD = 8
"""Four-bit fields of an int32."""
_SYMMETRIC_ZERO = 8


class AffineQuantized(ABC):
    """A QuantizedSource over the tensors of one layer: qweight, qzeros and scales.

    A subclass says how fields are packed into qweight, and into qzeros, int32 (in / group, out / 8). A group of more
    than 32 columns becomes groups of 32 with the same scale and offset.
    """

    def __init__(self, module: str, tensors: Mapping[str, TensorSource], group_size: int | None) -> None:
        """module: the layer's name; `tensors` are its own, by names such as "qweight". group_size: columns, None for
        whole rows. ValueError if the tensors do not fit together."""
        self.module = module
        for name in ("qweight", "qzeros", "scales"):
            if name not in tensors:
                raise ValueError(f"{module}.{name} is missing; download the model again")
            if len(shape := tensors[name].shape) != 2:
                raise ValueError(f"{module}.{name} has shape {shape}, expected a matrix; download the model again")
        self.qweight, self.qzeros, self.scales = (tensors[name] for name in ("qweight", "qzeros", "scales"))
        self.shape = self._shape()
        self.group_size = self.shape[1] if group_size is None else group_size
        self._check_shapes()

    @property
    def form(self) -> Form:
        return "int4"

    def read(self, dim: int, start: int, length: int) -> QuantizedWeight:
        columns = (start, length) if dim == 1 else (0, self.shape[1])
        first_group = columns[0] // self.group_size
        group_of = torch.arange(columns[0], sum(columns), GROUP) // self.group_size - first_group
        if dim == 0:
            scales, zeros = self.scales.read(1, start, length), self._read_zeros(1, start, length)
        else:
            num_groups = int(group_of[-1]) + 1
            scales, zeros = self.scales.read(0, first_group, num_groups), self._read_zeros(0, first_group, num_groups)
        scales, zeros = scales[group_of].t().contiguous(), zeros[group_of].t()  # (rows, columns / 32)
        offsets = (-scales.float() * zeros.float()).to(self.offsets_dtype)
        self._check_values(scales, offsets)
        return QuantizedWeight(self._read_levels(dim, start, length), scales.half(), offsets)

    @cached_property
    def offsets_dtype(self) -> torch.dtype:
        """Of all parts of the matrix. Reads all zeros, which are 1/32 of the file or less."""
        zeros = self._read_zeros(0, 0, self.scales.shape[0])
        return torch.float16 if bool((zeros == _SYMMETRIC_ZERO).all()) else torch.float32

    @abstractmethod
    def _shape(self) -> tuple[int, int]:
        """(out, in), from the shape of qweight."""

    @abstractmethod
    def _read_levels(self, dim: int, start: int, length: int) -> Tensor:
        """As in QuantizedWeight. dim: 0 for rows of the matrix, 1 for columns."""

    @abstractmethod
    def _zeros(self, words: Tensor) -> Tensor:
        """Words of qzeros (groups, n) -> zeros (groups, 8 n) in uint8, in the order of rows."""

    def _read_zeros(self, dim: int, start: int, length: int) -> Tensor:
        """(groups, rows) of zeros in uint8. dim: 0 for groups, 1 for rows."""
        if dim == 0:
            return self._zeros(self.qzeros.read(0, start, length))
        first, end = covering_words(start, length)
        return self._zeros(self.qzeros.read(1, first, end - first)).narrow(1, start - first * PER_WORD, length)

    def _check_shapes(self) -> None:
        rows, columns = self.shape
        size = self.group_size
        if size <= 0 or size % GROUP or columns % size:
            raise ValueError(
                f"{self.module} has {columns} columns, which group_size={size} must divide and be a multiple of "
                f"{GROUP}; quantize the model with group_size=128, or leave the layer unquantized"
            )
        expected = {"qzeros": (columns // size, rows // PER_WORD), "scales": (columns // size, rows)}
        for name, shape in expected.items():
            if (found := getattr(self, name).shape) != shape or rows % PER_WORD:
                raise ValueError(
                    f"{self.module}.{name} has shape {found}, expected {shape} from qweight {self.qweight.shape} and "
                    f"group_size={size}; download the model again"
                )
        for name in ("qweight", "qzeros"):
            if (dtype := getattr(self, name).dtype) != torch.int32:
                raise ValueError(f"{self.module}.{name} is {dtype}, expected torch.int32; download the model again")

    def _check_values(self, scales: Tensor, offsets: Tensor) -> None:
        if not torch.equal(scales.half().to(scales.dtype), scales) or not offsets.isfinite().all():
            raise ValueError(
                f"{self.module}.scales ({scales.dtype}) holds values that float16 cannot; quantize the model in float16"
            )


def covering_words(start: int, length: int) -> tuple[int, int]:
    """(first, end) of the words that hold these fields."""
    return start // PER_WORD, -(-(start + length) // PER_WORD)
