"""Quantized GGUF tensors as QuantizedWeight: the same numbers, in another order.

A row is a sequence of blocks of 32 weights: a float16 scale d, for Q4_1 a float16 minimum m, then the integers. Byte j
of a 4-bit block holds weight j in its low and weight j + 16 in its high four bits. Source: ggml-common.h of llama.cpp.

- Q8_0: d * q. - Q4_0: d * (q - 8) = q * d + (-8 d). - Q4_1: q * d + m.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llama_tp.model.quantization import QuantizedWeight, pack_nibbles
from llama_tp.model.weights import GROUP, Form

FORM_OF: Mapping[str, Form] = {"Q8_0": "int8_groups", "Q4_0": "int4", "Q4_1": "int4"}
"""GGUF types that are read without loss, by their names in the gguf package. Others are dequantised."""

_BLOCK_BYTES = {"Q8_0": 2 + 32, "Q4_0": 2 + 16, "Q4_1": 4 + 16}


@dataclass(frozen=True, slots=True)
class GgufQuantized:
    """A QuantizedSource over one tensor of a mapped GGUF file."""

    name: str
    kind: str
    """A key of FORM_OF."""
    data: Any
    """The blocks as the gguf package maps them: a numpy array of uint8 (out, bytes of a row)."""

    @property
    def shape(self) -> tuple[int, int]:
        rows, row_bytes = self.data.shape
        return rows, row_bytes // _BLOCK_BYTES[self.kind] * GROUP

    @property
    def form(self) -> Form:
        return FORM_OF[self.kind]

    @property
    def offsets_dtype(self) -> torch.dtype:
        return torch.float16

    def read(self, dim: int, start: int, length: int) -> QuantizedWeight:
        if dim == 0:
            part = self.data[start : start + length]
        else:
            assert start % GROUP == length % GROUP == 0
            size = _BLOCK_BYTES[self.kind]
            part = self.data[:, start // GROUP * size : (start + length) // GROUP * size]
        # A copy: the file is mapped read-only, which torch cannot take.
        quantized = from_blocks(torch.from_numpy(part.copy()), self.kind)
        _check_finite(self.name, self.kind, quantized)
        return quantized


def from_blocks(blocks: Tensor, kind: str) -> QuantizedWeight:
    """blocks: uint8 (rows, bytes of a row)."""
    by_group = blocks.unflatten(1, (-1, _BLOCK_BYTES[kind]))  # (rows, groups, bytes)
    scales = _float16(by_group[..., :2])
    if kind == "Q8_0":
        return QuantizedWeight(by_group[..., 2:].reshape(blocks.size(0), -1).view(torch.int8), scales)
    offsets = _float16(by_group[..., 2:4]) if kind == "Q4_1" else -8 * scales
    return QuantizedWeight(_neighbours_packed(by_group[..., -16:]), scales, offsets)


def _float16(pairs: Tensor) -> Tensor:
    """(..., 2) bytes -> (...)."""
    return pairs.contiguous().view(torch.float16).squeeze(-1)


def _neighbours_packed(halves: Tensor) -> Tensor:
    """Bytes of weights j and j + 16 (rows, groups, 16) -> bytes of weights 2j and 2j + 1 (rows, groups * 16)."""
    return torch.cat((pack_nibbles(halves & 15), pack_nibbles(halves >> 4)), dim=-1).flatten(1)


def _check_finite(name: str, kind: str, quantized: QuantizedWeight) -> None:
    parts = (quantized.scales, quantized.offsets)
    if not all(bool(part.isfinite().all()) for part in parts if part is not None):
        raise ValueError(
            f"{name} ({kind}) has a block whose scale is not finite, or for Q4_0 more than 65504 / 8; the file is "
            "damaged: download it again"
        )
