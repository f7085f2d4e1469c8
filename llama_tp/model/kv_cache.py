"""Keys and values of past tokens. A token lives in one slot, slot = page * page_size + offset, and never moves."""

from __future__ import annotations

import torch
from torch import Tensor


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
        # Zeroed, not empty: padded attention reads slots nobody has written, and 0 * NaN is NaN.
        shape = (n_layers, 2, num_pages * page_size, num_kv_heads, head_dim)
        self._data = torch.zeros(shape, dtype=dtype, device=device)
        self.layers = [LayerCache(*layer.unbind(0)) for layer in self._data.unbind(0)]

    @property
    def nbytes(self) -> int:
        return self._data.nbytes


class LayerCache:
    """One layer's keys and values, each (slots, K, d)."""

    __slots__ = ("k", "v")

    def __init__(self, k: Tensor, v: Tensor) -> None:
        self.k = k
        self.v = v

    def write(self, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Store k and v (T, K, d), already rotated, at slots (T,)."""
        self.k.index_copy_(0, slots, k)
        self.v.index_copy_(0, slots, v)
