"""Which logits depend on a token with a non-finite hidden state.

Legend: T tokens of a forward pass, S of them with logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

_NONE = 2**62


class NonFinite:
    """The first position with a non-finite hidden state in each page table row: a prompt may have one in one step and
    be sampled in a later one."""

    def __init__(self, num_rows: int, device: torch.device) -> None:
        self._first = torch.full((num_rows,), _NONE, dtype=torch.int64, device=device)
        self._ends = [0] * num_rows  # positions computed so far
        self._are_all_finite = not self._first.is_cuda  # a GPU would have to be waited for

    def begin(self, row: int) -> None:
        """The row has a new sequence."""
        self._first[row] = _NONE
        self._ends[row] = 0

    def advance(self, row: int, start: int, num_tokens: int) -> None:
        """The row's sequence computes positions from `start` on. If it has computed some of them before, those were
        rejected drafts, which are forgotten."""
        if start < self._ends[row]:
            first = self._first[row : row + 1]
            first.masked_fill_(first >= start, _NONE)
        self._ends[row] = start + num_tokens

    def depends(self, is_finite: Tensor, rows: Tensor, positions: Tensor, sampled: Tensor) -> Tensor | None:
        """Note which tokens of a pass are finite (T,), given their rows and positions, both (T,). Returns (S,) whether
        the logits of the tokens at indices `sampled` depend on a token that is not; None if no token ever was not."""
        if self._are_all_finite and is_finite.all():
            return None
        self._are_all_finite = False
        self._first.scatter_reduce_(0, rows, positions.masked_fill(is_finite, _NONE), "amin")
        return self._first[rows[sampled]] <= positions[sampled]
