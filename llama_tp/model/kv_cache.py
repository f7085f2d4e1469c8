"""Keys and values of past tokens. A token occupies one slot, slot = page * page_size + offset, and never moves.

Legend: B sequences, K kv heads, S keys, T tokens, d head dim, P pages.

In memory the slots of one head are contiguous, the order in which attention reads them: 1.2 to 1.8 times as fast as
with the heads of a slot contiguous (measured: docs/performance.md). Scattered slots are gathered page by page.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import torch
from torch import Tensor

from llama_tp.model.memory import empty


class PageList:
    """One sequence's pages, in token order, and the ranges of contiguous slots that they are."""

    __slots__ = ("_page_size", "pages", "ranges")

    def __init__(self, page_size: int) -> None:
        self.pages: list[int] = []
        self.ranges = array("i")
        """First slot and length of each range."""
        self._page_size = page_size

    def set(self, index: int, page: int) -> None:
        """Set the entry at `index`, and drop all later ones."""
        pages, ranges, size = self.pages, self.ranges, self._page_size
        dropped = (len(pages) - index) * size
        del pages[index:]
        while dropped > 0:
            cut = min(dropped, ranges[-1])
            dropped -= cut
            ranges[-1] -= cut
            if ranges[-1] == 0:
                del ranges[-2:]
        if pages and page == pages[-1] + 1:
            ranges[-1] += size
        else:
            ranges.extend((page * size, size))
        pages.append(page)

    def covers(self, position: int) -> bool:
        """Whether the token at this position has a page."""
        return position < len(self.pages) * self._page_size

    def slots(self, start: int, end: int) -> list[int]:
        """The slots of positions start .. end - 1."""
        pages, size = self.pages, self._page_size
        return [pages[at // size] * size + at % size for at in range(start, end)]

    def ranges_of(self, length: int, limit: int) -> list[SlotRange]:
        """The ranges of the first `length` tokens; empty if there are more than `limit`."""
        found: list[SlotRange] = []
        for at in range(0, len(self.ranges), 2):
            if length <= 0:
                break
            if len(found) == limit:
                return []
            first, size = self.ranges[at : at + 2]
            found.append(SlotRange(first, min(size, length)))
            length -= size
        return found


@dataclass(frozen=True, slots=True)
class SlotRange:
    """Contiguous slots: of one sequence, or of `count` sequences whose ranges begin `stride` slots apart."""

    first: int
    length: int
    count: int = 1
    stride: int = 0


@dataclass(frozen=True, slots=True)
class GatheredPages:
    """Scattered pages to copy together, made by `KVCache.gathered`."""

    indices: Tensor
    """(B * K * P,) indices of (head, page) pairs in the flattened cache."""
    batch: int
    length: int
    """S: later slots are not read."""
    count: int = 1
    """How often to repeat the sequence, if B is 1."""


SlotMapping = tuple[tuple[slice, slice | Tensor], ...]
"""Tokens of a step and the slots to store them in, contiguous or not."""


class KVCache:
    """The cache tensors of all layers of one rank.

    `num_kv_heads` is the number of *local* kv heads. The caller decides which slots a sequence uses.
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
        # Zeroed, not empty: padded attention reads unwritten slots, and 0 * NaN is NaN.
        shape = (n_layers, 2, num_kv_heads, num_pages * page_size, head_dim)
        self._data = empty(shape, dtype, self.device).zero_()
        self.layers = [LayerCache(layer[0], layer[1], page_size) for layer in self._data.unbind(0)]
        self._heads = torch.arange(num_kv_heads, device=device).mul_(num_pages).view(1, -1, 1)

    @property
    def nbytes(self) -> int:
        return self._data.nbytes

    def memory(self) -> Tensor:
        """All keys and values, (layers, 2, K, slots, d)."""
        return self._data

    @property
    def bytes_per_slot(self) -> int:
        """Bytes per slot in one layer."""
        return 2 * self.num_kv_heads * self._data.size(-1) * self.dtype.itemsize

    def gathered(self, table: Tensor, length: int, count: int = 1) -> GatheredPages:
        """The first `length` slots of each sequence in a page table (B, P)."""
        return GatheredPages((self._heads + table.unsqueeze(1)).flatten(), table.size(0), length, count)


class LayerCache:
    """One layer's keys and values, each (slots, K, d)."""

    __slots__ = ("_k_pages", "_page_size", "_v_pages", "k", "v")

    def __init__(self, k: Tensor, v: Tensor, page_size: int) -> None:
        """k and v in memory layout: (K, slots, d)."""
        self.k, self.v = k.transpose(0, 1), v.transpose(0, 1)
        self._page_size = page_size
        self._k_pages, self._v_pages = (part.view(-1, page_size * part.size(-1)) for part in (k, v))

    def write(self, mapping: SlotMapping, k: Tensor, v: Tensor) -> None:
        """Store k and v (T, K, d), already rotated."""
        for tokens, slots in mapping:
            if isinstance(slots, slice):
                self.k[slots] = k[tokens]
                self.v[slots] = v[tokens]
            else:
                self.k.index_copy_(0, slots, k[tokens])
                self.v.index_copy_(0, slots, v[tokens])

    def read(self, keys: SlotRange | GatheredPages) -> tuple[Tensor, Tensor]:
        """Keys and values (B, K, S, d): views of a range, copies of scattered pages."""
        if isinstance(keys, SlotRange):
            return _view(self.k, keys), _view(self.v, keys)
        return self._gather(self._k_pages, keys), self._gather(self._v_pages, keys)

    def _gather(self, pages: Tensor, keys: GatheredPages) -> Tensor:
        found = pages.index_select(0, keys.indices).view(keys.batch, self.k.size(1), -1, self.k.size(2))
        found = found[:, :, : keys.length]
        return found if keys.count == 1 else found.expand(keys.count, -1, -1, -1)


def _view(slots: Tensor, wanted: SlotRange) -> Tensor:
    """A range of (slots, K, d)."""
    _, num_kv_heads, d = slots.shape
    slot, head, element = slots.stride()
    shape, strides = (wanted.count, num_kv_heads, wanted.length, d), (wanted.stride * slot, head, slot, element)
    return slots.as_strided(shape, strides, slots.storage_offset() + wanted.first * slot)
