"""Random weights in every weight format, for measurements of speed: nobody's values, so no checkpoint is needed.

The speed of a layer does not depend on the values, except where all are zero: a CPU's page of zeros is shared and in
cache, and a GPU that multiplies zeros draws less power.
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from llama_tp.model.linear import Linear
from llama_tp.model.memory import empty
from llama_tp.model.weights import PACKED, Layout, WeightFormat

STD = 0.02
"""Of dense weights and biases, as models are initialised."""
_BLOCK = (1 << 20) + 7
"""Values drawn: a tensor is filled with them over and over. Odd, so that rows do not repeat."""
_LEVELS = {torch.int8: (-127, 128), torch.uint8: (0, 256)}
"""Lower (inclusive) and upper (exclusive) limits of integers: a level, or two of int4."""
_LEVEL_STD = {"row_scales": 73.6, "scales": 73.6, "int4": 4.61}
"""Standard deviation of uniform levels, so that scales give weights with a deviation of STD."""
_INT4_MIDDLE = 7.5


class RandomWeights:
    """Fills parameters with values that depend only on their names: the same in every process, in every shape."""

    def __init__(self, device: torch.device | str, seed: int = 0) -> None:
        self._device = torch.device(device)
        self._seed = seed
        self._blocks: dict[torch.dtype, Tensor] = {}

    def values(self, count: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """A vector of values."""
        out = empty((count,), dtype, self._device)
        self._fill(out, start=0)
        return out

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, *, is_int4: bool = False) -> Tensor:
        """A parameter by its Meta name, as `WeightFormat.parameters` calls it.

        is_int4: whether it belongs to a layer in int4, whose levels are fewer.
        """
        out = empty(shape, dtype, self._device)
        self.fill(name, out, is_int4=is_int4)
        return out

    def fill(self, name: str, out: Tensor, *, is_int4: bool = False) -> None:
        """As `tensor`, in memory that is there. Vectors that scale (norms) are ones."""
        kind = name.rpartition(".")[2]
        if kind == "weight" and out.dim() == 1:
            out.fill_(1)
        elif kind in ("row_scales", "scales", "offsets"):
            std = STD / _LEVEL_STD["int4" if is_int4 else kind]
            out.fill_(-_INT4_MIDDLE * std if kind == "offsets" else std)
        else:
            self._fill(out.view(-1), start=zlib.crc32(name.encode()) % _BLOCK)

    def _fill(self, out: Tensor, start: int) -> None:
        block = self._block(out.dtype)
        first = min(out.numel(), _BLOCK - start)
        out[:first] = block[start : start + first]
        for at in range(first, out.numel(), _BLOCK):
            part = out[at : at + _BLOCK]
            part.copy_(block[: part.numel()])

    def _block(self, dtype: torch.dtype) -> Tensor:
        if dtype not in self._blocks:
            generator = torch.Generator().manual_seed(self._seed)  # of the CPU: the same values on every device
            if dtype in _LEVELS:
                values = torch.randint(*_LEVELS[dtype], (_BLOCK,), dtype=dtype, generator=generator)
            else:
                values = torch.empty(_BLOCK).normal_(0, STD, generator=generator).to(dtype)
            self._blocks[dtype] = values.to(self._device)
        return self._blocks[dtype]


def random_linear(
    name: str,
    out_features: int,
    in_features: int,
    weight_format: WeightFormat,
    dtype: torch.dtype,
    weights: RandomWeights,
    layout: Layout = PACKED,
) -> Linear:
    """A layer of this shape without bias, as the engine would compute it."""
    parameters = weight_format.parameters(out_features, in_features)
    tensors = {
        kind: weights.tensor(
            f"{name}.{kind}", shape, dtype if own is None else getattr(torch, own), is_int4="offsets" in parameters
        )
        for kind, (shape, own) in parameters.items()
    }
    return weight_format.linear([tensors], dtype, layout)
