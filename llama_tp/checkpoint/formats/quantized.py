"""The interface of quantized matrices that are read a part at a time, as `TensorSource` is of dense ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from llama_tp.checkpoint.formats.rotary import stored_rows
from llama_tp.model.quantization import Form, QuantizedWeight


class QuantizedSource(Protocol):
    """One full (unsharded) quantized matrix that is not in memory yet."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the matrix."""
        ...

    @property
    def form(self) -> Form: ...

    def read(self, dim: int, start: int, length: int) -> QuantizedWeight:
        """`length` rows (dim 0) or columns (dim 1, both multiples of 32) from `start`. Every read of a matrix gives
        tensors of the same dtypes. ValueError if the file holds numbers that the form cannot."""
        ...


@dataclass(frozen=True, slots=True)
class RotaryQuantized:
    """A QuantizedSource that gives the rows of whole heads in Meta's order, as RotaryTensor does.

    Rows can be reordered because groups are within a row. Holds up to two heads more than are read.
    """

    stored: QuantizedSource
    head_dim: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.stored.shape

    @property
    def form(self) -> Form:
        return self.stored.form

    def read(self, dim: int, start: int, length: int) -> QuantizedWeight:
        if dim != 0:
            return self.stored.read(dim, start, length).select_rows(stored_rows(0, self.shape[0], self.head_dim))
        first = start // self.head_dim * self.head_dim
        end = -(-(start + length) // self.head_dim) * self.head_dim
        return self.stored.read(0, first, end - first).select_rows(stored_rows(start, length, self.head_dim) - first)
