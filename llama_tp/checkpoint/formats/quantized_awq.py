"""Linear layers of AWQ checkpoints (AutoAWQ's "gemm" version), read without loss.

qweight is int32 (in, out / 8): the fields of a word are 8 rows of a column. From the lowest bits they are rows 0, 2, 4,
6, 1, 3, 5, 7, in qzeros as well. Source: WQLinear_GEMM.from_linear() of AutoAWQ.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llama_tp.checkpoint.formats.quantized_affine import PER_WORD, AffineQuantized, covering_words
from llama_tp.model.quantization import pack_nibbles, unpack_nibbles

_FIELD_OF_ROW = (0, 4, 1, 5, 2, 6, 3, 7)


class AwqQuantized(AffineQuantized):
    """A QuantizedSource over a layer of an AWQ checkpoint."""

    def _shape(self) -> tuple[int, int]:
        columns, words = self.qweight.shape
        return words * PER_WORD, columns

    def _read_levels(self, dim: int, start: int, length: int) -> Tensor:
        if dim == 1:
            return pack_nibbles(_fields(self.qweight.read(0, start, length)).t())
        first, end = covering_words(start, length)
        fields = _fields(self.qweight.read(1, first, end - first))
        return pack_nibbles(fields.narrow(1, start - first * PER_WORD, length).t())

    def _zeros(self, words: Tensor) -> Tensor:
        return _fields(words)


def _fields(words: Tensor) -> Tensor:
    """(n, m) words -> (n, 8 m) fields in uint8, in the order of rows."""
    stored = unpack_nibbles(words.contiguous().view(torch.uint8))
    return stored.unflatten(1, (-1, PER_WORD))[:, :, list(_FIELD_OF_ROW)].flatten(1)
