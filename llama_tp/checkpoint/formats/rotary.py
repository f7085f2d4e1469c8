"""The rows of query and key heads, from the order in which others rotate them into Meta's.

transformers and NeoX rotate the two halves of a head against each other, Meta neighbouring elements.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llama_tp.checkpoint.formats.reader import TensorSource


def is_rotated(name: str) -> bool:
    """Whether a weight or bias, by Meta's name, belongs to a module whose output is rotated, or scales what is."""
    return name.split(".")[-2] in ("wq", "wk", "q_norm", "k_norm")


def in_metas_order(name: str, stored: TensorSource, head_dim: int) -> TensorSource:
    """A tensor of a model that rotates halves, in Meta's order. `name`: Meta's."""
    return RotaryTensor(stored, head_dim) if is_rotated(name) else stored


@dataclass(frozen=True, slots=True)
class RotaryTensor:
    """A TensorSource that gives the rows of whole heads in Meta's order. Holds up to two heads more than are read."""

    stored: TensorSource
    head_dim: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.stored.dtype

    def read(self, dim: int, start: int, length: int) -> Tensor:
        if dim != 0:
            return self.stored.read(dim, start, length)[stored_rows(0, self.shape[0], self.head_dim)]
        first = start // self.head_dim * self.head_dim
        end = -(-(start + length) // self.head_dim) * self.head_dim
        return self.stored.read(0, first, end - first)[stored_rows(start, length, self.head_dim) - first]


def stored_rows(start: int, length: int, head_dim: int) -> Tensor:
    """Where the rows start, start + 1, ... of Meta's order are stored: (first, second) of all pairs side by side
    became all first, then all second."""
    rows = torch.arange(start, start + length)
    head, within = rows // head_dim, rows % head_dim
    return head * head_dim + within % 2 * (head_dim // 2) + within // 2


def in_halves(rows: Tensor, head_dim: int) -> Tensor:
    """The inverse, for all rows of whole heads: the first elements of all pairs, then the second ones."""
    return rows.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)
