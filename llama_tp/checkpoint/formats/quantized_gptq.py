"""Linear layers of GPTQ checkpoints (AutoGPTQ, GPTQModel), read without loss.

qweight is int32 (in / 8, out): the fields of a word, from the lowest bits, are 8 columns of a row. Fields of qzeros are
rows. checkpoint_format "gptq" stores zero - 1, "gptq_v2" zero. g_idx (in) is each column's group: with desc_act=true,
groups are scattered over the columns. Source: pack_original() and convert_gptq_v1_to_v2_format_module() of GPTQModel.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from llama_tp.checkpoint.formats.quantized_affine import PER_WORD, AffineQuantized
from llama_tp.checkpoint.formats.reader import TensorSource
from llama_tp.model.quantization import unpack_nibbles

_ONES = 0x11111111
"""1 in every field."""


class GptqQuantized(AffineQuantized):
    """A QuantizedSource over a layer of a GPTQ checkpoint."""

    def __init__(
        self, module: str, tensors: Mapping[str, TensorSource], group_size: int | None, *, zeros_less_one: bool
    ) -> None:
        super().__init__(module, tensors, group_size)
        self.zeros_less_one = zeros_less_one
        if "g_idx" in tensors:
            self._check_order(tensors["g_idx"])

    def _shape(self) -> tuple[int, int]:
        words, rows = self.qweight.shape
        return rows, words * PER_WORD

    def _read_levels(self, dim: int, start: int, length: int) -> Tensor:
        if dim == 0:
            words = self.qweight.read(1, start, length)
        else:
            words = self.qweight.read(0, start // PER_WORD, length // PER_WORD)
        # A row's words, in little-endian bytes, are what QuantizedWeight holds.
        return words.t().contiguous().view(torch.uint8)

    def _zeros(self, words: Tensor) -> Tensor:
        # The sum of whole words: where zero - 1 was -1, GPTQModel has borrowed from the next field.
        stored = words + _ONES if self.zeros_less_one else words
        return unpack_nibbles(stored.contiguous().view(torch.uint8))

    def _check_order(self, g_idx: TensorSource) -> None:
        columns = self.shape[1]
        in_order = torch.arange(columns) // self.group_size
        if g_idx.shape != (columns,) or not torch.equal(g_idx.read(0, 0, columns).long(), in_order):
            raise ValueError(
                f"{self.module}.g_idx does not number the columns' groups in order: the layer was quantized with "
                "desc_act=true, which is not supported; use a model with desc_act=false, or one quantized by AWQ"
            )
