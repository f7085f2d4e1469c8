"""Keys and values of past tokens. A token lives in one slot, slot = page * page_size + offset, and never moves.

Legend: B sequences, K kv heads, S keys, T tokens, d head dim, P pages.

In memory the slots of one head lie side by side, because attention reads them so: 1.2 to 1.8 times as fast as with the
heads of a slot side by side (measured: docs/performance.md). What is scattered is gathered by the page.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring slots: of one sequence, or of `count` sequences that lie `stride` slots apart."""

    first: int
    length: int
    count: int = 1
    stride: int = 0


@dataclass(frozen=True, slots=True)
class Pages:
    """Scattered pages: `KVCache.pages` makes them."""

    rows: Tensor
    """(B * K * P,) each page of each head, in the cache seen as a list of them."""
    batch: int
    length: int
    """S: slots beyond are not read."""
    count: int = 1
    """So many times the one sequence, where B is 1."""


Place = tuple[slice, slice | Tensor]
"""Tokens of a step, and their slots: neighbours or not."""


class KVCache:
    """The cache tensors of all layers of one rank.

    `num_kv_heads` is the number of *local* kv heads. Page 0 .. num_pages - 1 are the allocator's; what slots a
    sequence uses is the caller's business.
    """

    def __init__(
        self,
        *,
        n_layers: int,
        num_pages: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self.page_size = page_size
        self.num_pages = num_pages
        self.num_kv_heads = num_kv_heads
        self.dtype = dtype
        self.device = torch.device(device)
        # Zeroed, not empty: padded attention reads slots nobody has written, and 0 * NaN is NaN.
        shape = (n_layers, 2, num_kv_heads, num_pages * page_size, head_dim)
        self._data = torch.zeros(shape, dtype=dtype, device=device)
        self.layers = [LayerCache(layer[0], layer[1], page_size) for layer in self._data.unbind(0)]
        self._heads = torch.arange(num_kv_heads, device=device).mul_(num_pages).view(1, -1, 1)

    @property
    def nbytes(self) -> int:
        return self._data.nbytes

    @property
    def bytes_per_slot(self) -> int:
        """Of one layer."""
        return 2 * self.num_kv_heads * self._data.size(-1) * self.dtype.itemsize

    def pages(self, table: Tensor, length: int, count: int = 1) -> Pages:
        """The first `length` slots of each sequence of a page table (B, P)."""
        return Pages((self._heads + table.unsqueeze(1)).flatten(), table.size(0), length, count)


class LayerCache:
    """One layer's keys and values, each (slots, K, d)."""

    __slots__ = ("_k_pages", "_page_size", "_v_pages", "k", "v")

    def __init__(self, k: Tensor, v: Tensor, page_size: int) -> None:
        """k and v as they lie in memory: (K, slots, d)."""
        self.k, self.v = k.transpose(0, 1), v.transpose(0, 1)
        self._page_size = page_size
        self._k_pages, self._v_pages = (part.view(-1, page_size * part.size(-1)) for part in (k, v))

    def write(self, places: tuple[Place, ...], k: Tensor, v: Tensor) -> None:
        """Store k and v (T, K, d), already rotated, where the places say."""
        for rows, slots in places:
            if isinstance(slots, slice):
                self.k[slots] = k[rows]
                self.v[slots] = v[rows]
            else:
                self.k.index_copy_(0, slots, k[rows])
                self.v.index_copy_(0, slots, v[rows])

    def read(self, keys: Run | Pages) -> tuple[Tensor, Tensor]:
        """Keys and values (B, K, S, d): views of a run, copies of scattered pages."""
        if isinstance(keys, Run):
            return _view(self.k, keys), _view(self.v, keys)
        return self._gather(self._k_pages, keys), self._gather(self._v_pages, keys)

    def _gather(self, pages: Tensor, keys: Pages) -> Tensor:
        found = pages.index_select(0, keys.rows).view(keys.batch, self.k.size(1), -1, self.k.size(2))
        found = found[:, :, : keys.length]
        return found if keys.count == 1 else found.expand(keys.count, -1, -1, -1)


def _view(slots: Tensor, run: Run) -> Tensor:
    """A run's part of (slots, K, d)."""
    _, num_kv_heads, d = slots.shape
    slot, head, element = slots.stride()
    shape, strides = (run.count, num_kv_heads, run.length, d), (run.stride * slot, head, slot, element)
    return slots.as_strided(shape, strides, slots.storage_offset() + run.first * slot)
