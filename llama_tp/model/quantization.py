"""Quantized matrices: integers, and the scales that turn them back into weights.

Three forms of a matrix W (out, in). All but int8 have one scale for each group of 32 columns of a row:

- int8: `weight` int8 (out, in), `scales` float32 (out, 1); W = weight * scales.
- int8_groups: `weight` int8 (out, in), `scales` float16 (out, in / 32); W = weight * scales. The same numbers as GGUF's
  Q8_0.
- int4: `weight` uint8 (out, in / 2) holds columns 2j and 2j + 1 in the low and high four bits of byte j; `scales`
  float16 and `offsets` float16 or float32 (out, in / 32); W = q * scales + offsets for q in 0..15. The same numbers as
  GGUF's Q4_0 and Q4_1, GPTQ and AWQ.

Groups are independent: any rows, and any columns from a multiple of 32 on, are a quantized matrix of their own.

`quantize` minimises the squared error of each group. Unlike GPTQ and AWQ, it needs no calibration data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from llama_tp.model.weights import GROUP, Form

FORMS: tuple[Form, ...] = get_args(Form)

_CHUNK = 1 << 17
"""Elements that are converted at a time: few enough that all temporary tensors stay in a core's cache."""
_MIN_SCALE = {torch.float16: 2.0**-24, torch.float32: 2.0**-120}
"""Smallest scale stored. Of float16 it is the smallest positive number; of float32 one whose inverse is finite."""
_LARGEST: dict[Form, float] = {
    "int8": torch.finfo(torch.float32).max,
    "int8_groups": 127 * torch.finfo(torch.float16).max,
    "int4": torch.finfo(torch.float16).max,
}
"""Magnitudes that a form can hold."""
_CHANNEL_SHRINKS = (1.0, 0.95, 0.9, 0.8)
"""Scales tried for int8, relative to the scale that clips nothing. Few rows gain: clipping an outlier costs much."""
_GROUP_SHRINKS = (1.0, 0.995, 0.99, 0.98, 1.005, 1.01, 1.02, 1.03)
"""Scales tried for int8_groups. The rounding errors of 32 numbers differ from scale to scale."""
_INT4_CUTS = ((0.0, 0.0), (0.07, 0.0), (0.0, 0.07), (0.035, 0.0), (0.0, 0.035), (0.035, 0.035), (0.07, 0.07))
"""Where the search for int4 starts: parts of a group's range cut off at its lower and upper end."""
_INT4_REFITS = 4
"""Least-squares refits of the best start, after one of each start."""


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A quantized matrix; the module docstring describes the three forms."""

    weight: Tensor
    scales: Tensor
    offsets: Tensor | None = None
    """Of int4 only."""

    @property
    def form(self) -> Form:
        if self.offsets is not None:
            return "int4"
        return "int8" if self.scales.dtype == torch.float32 else "int8_groups"

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the matrix."""
        rows, columns = self.weight.shape
        return rows, columns if self.offsets is None else 2 * columns

    @property
    def num_bytes(self) -> int:
        return self.weight.nbytes + self.scales.nbytes + (0 if self.offsets is None else self.offsets.nbytes)

    def rows(self, start: int, length: int) -> QuantizedWeight:
        """Rows start, ..., start + length - 1: views."""
        return self._map(lambda part: part.narrow(0, start, length))

    def columns(self, start: int, length: int) -> QuantizedWeight:
        """Columns start, ..., start + length - 1, both multiples of 32: views."""
        assert start % GROUP == length % GROUP == 0
        columns = self.shape[1]

        def part(tensor: Tensor) -> Tensor:
            # Every tensor has one column for this many of the matrix; the scales of int8 are for whole rows.
            per_column = columns // tensor.size(1)
            if self.form == "int8" and tensor is self.scales:
                return tensor
            return tensor.narrow(1, start // per_column, length // per_column)

        return self._map(part)

    def select_rows(self, index: Tensor) -> QuantizedWeight:
        """The rows that `index` (int64) lists, in its order: copies."""
        return self._map(lambda part: part.index_select(0, index))

    def _map(self, function: Callable[[Tensor], Tensor]) -> QuantizedWeight:
        offsets = None if self.offsets is None else function(self.offsets)
        return QuantizedWeight(function(self.weight), function(self.scales), offsets)


def quantize(weight: Tensor, form: Form) -> QuantizedWeight:
    """The matrix in `form`, with the scales of least squared error that a search finds.

    weight: (out, in), floating point, `in` a multiple of 32. The result depends on each group (int8: each row) alone,
    and needs temporary memory for 2^17 elements, or one row. ValueError says what the form cannot hold.
    """
    if weight.dim() != 2 or weight.size(1) % GROUP or not weight.is_floating_point():
        raise ValueError(
            f"weight has shape {tuple(weight.shape)} and dtype {weight.dtype}, expected a floating-point matrix whose "
            f"columns are a multiple of {GROUP}; leave it unquantized"
        )
    if form not in FORMS:
        raise ValueError(f"form={form!r} is unknown; choose one of {', '.join(FORMS)}")
    out = _empty(weight, form)
    for start, length in _row_chunks(weight):
        part = weight.detach().narrow(0, start, length).float()
        _check_values(part, start, form)
        _quantize_into(out.rows(start, length), part)
    return out


def dequantize(quantized: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """The matrix (out, in): computed in float32, rounded once to `dtype`."""
    out = torch.empty(quantized.shape, dtype=dtype, device=quantized.weight.device)
    for start, length in _row_chunks(out):
        out.narrow(0, start, length).copy_(_dequantized(quantized.rows(start, length)))
    return out


def pack_nibbles(levels: Tensor) -> Tensor:
    """(..., columns) of 0..15 in uint8 -> (..., columns / 2): two columns a byte, the first in the low four bits."""
    return levels[..., 0::2] | (levels[..., 1::2] << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """The inverse of `pack_nibbles`."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def _empty(weight: Tensor, form: Form) -> QuantizedWeight:
    rows, columns = weight.shape
    groups = (rows, columns // GROUP)
    if form == "int8":
        return QuantizedWeight(
            weight.new_empty((rows, columns), dtype=torch.int8), weight.new_empty((rows, 1), dtype=torch.float32)
        )
    if form == "int8_groups":
        return QuantizedWeight(
            weight.new_empty((rows, columns), dtype=torch.int8), weight.new_empty(groups, dtype=torch.float16)
        )
    return QuantizedWeight(
        weight.new_empty((rows, columns // 2), dtype=torch.uint8),
        weight.new_empty(groups, dtype=torch.float16),
        weight.new_empty(groups, dtype=torch.float16),
    )


def _row_chunks(matrix: Tensor) -> Iterator[tuple[int, int]]:
    """(start, length) of parts of about _CHUNK elements."""
    rows, columns = matrix.shape
    step = max(1, _CHUNK // max(1, columns))
    for start in range(0, rows, step):
        yield start, min(step, rows - start)


def _dequantized(quantized: QuantizedWeight) -> Tensor:
    """In float32. A product with a float16 scale is exact, so one with an offset is rounded once, as in a fused
    multiply-add."""
    if quantized.form == "int8":
        return quantized.weight.float() * quantized.scales
    scales = quantized.scales.float().unsqueeze(-1)  # (rows, groups, 1)
    if quantized.offsets is None:
        return (quantized.weight.float().unflatten(1, (-1, GROUP)) * scales).flatten(1)
    levels = unpack_nibbles(quantized.weight).float().unflatten(1, (-1, GROUP))
    return (levels * scales + quantized.offsets.float().unsqueeze(-1)).flatten(1)


def _quantize_into(out: QuantizedWeight, weight: Tensor) -> None:
    """weight: (rows, in) in float32."""
    if out.form == "int8":
        levels, scales = _search_int8(weight, _CHANNEL_SHRINKS, torch.float32, dim=1)
        out.weight.copy_(levels)
        out.scales.copy_(scales)
        return
    groups = weight.reshape(-1, GROUP).t().contiguous()  # (32, G): sums over a group are sums of long vectors
    if out.offsets is None:
        levels, scales = _search_int8(groups, _GROUP_SHRINKS, torch.float16, dim=0)
        out.weight.copy_(levels.to(torch.int8).t().reshape(weight.shape))
    else:
        levels, scales, offsets = _Int4Search(groups).run()
        out.weight.copy_(pack_nibbles(levels.to(torch.uint8).t().reshape(weight.shape)))
        out.offsets.copy_(offsets.view(out.offsets.shape))
    out.scales.copy_(scales.view(out.scales.shape))


def _check_values(weight: Tensor, first_row: int, form: Form) -> None:
    largest = weight.abs().amax(1)
    sound = largest <= _LARGEST[form]  # not nan
    if not sound.all():
        row = int(sound.logical_not().nonzero()[0])
        raise ValueError(
            f"row {first_row + row} of the weight holds {largest[row].item():g}, expected magnitudes of at most "
            f"{_LARGEST[form]:g} for {form}; leave it unquantized"
        )


def _search_int8(weight: Tensor, shrinks: tuple[float, ...], dtype: torch.dtype, *, dim: int) -> tuple[Tensor, Tensor]:
    """(levels in -127..127, scales): the best of several scales for each group. Both in float32.

    dim: the groups' own dim, 1 in the shape of the scales. `shrinks` begins with 1, which is plain rounding.
    """
    scale_for_all = weight.abs().amax(dim, keepdim=True) / 127
    best_scale = _stored(scale_for_all, dtype)
    least = torch.full_like(best_scale, torch.inf)
    levels, scratch = torch.empty_like(weight), torch.empty_like(weight)
    for shrink in shrinks:
        scale = _stored(scale_for_all * shrink, dtype)
        torch.mul(_int8_levels(weight, scale, levels), scale, out=scratch).sub_(weight).square_()
        error = _fold(scratch, dim)
        best_scale = torch.where(error < least, scale, best_scale)
        least = torch.minimum(error, least)
    return _int8_levels(weight, best_scale, levels), best_scale


def _int8_levels(weight: Tensor, scale: Tensor, out: Tensor) -> Tensor:
    return torch.mul(weight, scale.reciprocal(), out=out).round_().clamp_(-127, 127)


class _Int4Search:
    """Levels, scales and offsets of least squared error for groups (32, G).

    From several ranges, each within that of the group: round to levels, then fit scale and offset to the levels by
    least squares, and so on from the best so far. Similar to llama.cpp's make_qkx2_quants. All sums are over one
    group in an order that does not depend on its neighbours.
    """

    def __init__(self, groups: Tensor) -> None:
        self.groups = groups
        self.low, high = groups.amin(0), groups.amax(0)
        self.middle = (self.low + high) / 2
        self.range = high - self.low
        # Errors are differences of sums, so sums should be small.
        self.centred = groups - self.middle
        self.levels, self.scratch = torch.empty_like(groups), torch.empty_like(groups)
        self.sum = _fold(self.scratch.copy_(self.centred), 0)[0]
        self.sum_squares = _fold(torch.mul(self.centred, self.centred, out=self.scratch), 0)[0]
        self.scale, self.offset = self._plain()
        self.least = torch.full_like(self.low, torch.inf)

    def run(self) -> tuple[Tensor, Tensor, Tensor]:
        """(levels (32, G), scales (G), offsets (G)), in float32."""
        for cut_low, cut_high in _INT4_CUTS:
            scale = _stored(self.range * ((1 - cut_low - cut_high) / 15), torch.float16)
            self._try(*self._try(scale, _to_float16(self.low + self.range * cut_low)))
        refit = self._try(self.scale, self.offset)
        for _ in range(_INT4_REFITS - 1):
            refit = self._try(*refit)
        self._try(*refit)
        self._keep_plain_where_better()
        return self._levels(self.groups, self.scale, self.offset), self.scale, self.offset

    def _plain(self) -> tuple[Tensor, Tensor]:
        return _stored(self.range / 15, torch.float16), _to_float16(self.low)

    def _try(self, scale: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
        """Keep these for the groups whose error they lower; (scale, offset) of the least-squares fit to their levels,
        rounded to what is stored."""
        offset_from_middle = offset - self.middle
        levels = self._levels(self.centred, scale, offset_from_middle)
        total = levels.sum(0)  # exact, so is the sum of squares
        products = _fold(torch.mul(levels, self.centred, out=self.scratch), 0)[0]
        squares = levels.square_().sum(0)
        error = self.sum_squares + scale * (scale * squares + 2 * (offset_from_middle * total - products))
        error += offset_from_middle * (GROUP * offset_from_middle - 2 * self.sum)
        is_better = error < self.least
        self.least = torch.where(is_better, error, self.least)
        self.scale = torch.where(is_better, scale, self.scale)
        self.offset = torch.where(is_better, offset, self.offset)
        slope = (GROUP * products - total * self.sum) / (GROUP * squares - total.square()).clamp_(min=1)
        fitted_offset = _to_float16((self.sum - slope * total) / GROUP + self.middle)
        # The scale is fitted to the rounded offset, which may be far off for a group far from zero.
        fitted_scale = (products - (fitted_offset - self.middle) * total) / squares.clamp_(min=1)
        return _stored(fitted_scale, torch.float16), fitted_offset

    def _levels(self, values: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
        inverse = scale.reciprocal()
        return torch.mul(values, inverse, out=self.levels).sub_(offset * inverse).round_().clamp_(0, 15)

    def _keep_plain_where_better(self) -> None:
        """`_try` computes errors with rounding errors of its own; these are exact enough to promise an order."""
        scale, offset = self._plain()
        is_better = self._error(scale, offset) < self._error(self.scale, self.offset)
        self.scale = torch.where(is_better, scale, self.scale)
        self.offset = torch.where(is_better, offset, self.offset)

    def _error(self, scale: Tensor, offset: Tensor) -> Tensor:
        levels = self._levels(self.groups, scale, offset)
        torch.mul(levels, scale, out=self.scratch).add_(offset).sub_(self.groups).square_()
        return _fold(self.scratch, 0)[0]


def _fold(values: Tensor, dim: int) -> Tensor:
    """Sums over `dim`, whose size becomes 1. Overwrites `values`.

    torch.sum adds in an order that depends on the other dims.
    """
    size = values.size(dim)
    while size > 1:
        half = size // 2
        values.narrow(dim, 0, half).add_(values.narrow(dim, size - half, half))
        size -= half
    return values.narrow(dim, 0, 1).clone()


def _stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """A scale as it will be read back, positive, in float32."""
    return scale.to(dtype).float().clamp_(min=_MIN_SCALE[dtype])


def _to_float16(values: Tensor) -> Tensor:
    return values.half().float()
