"""Where each row's tokens lie in the KV cache, and how a step's queries reach them in the fewest attention calls.

A row whose pages are neighbours (a run) is read in place, as a slice; runs at equal distances are read in place
together, as one strided view. Only rows whose pages are scattered are gathered.
"""

from __future__ import annotations

from collections.abc import Sequence as Items

import torch
from torch import Tensor

from llama_tp.engine.request import Chunk
from llama_tp.model.attention import Span
from llama_tp.model.kv_cache import KVCache, Pages, Run

_CALL_BYTES = 1 << 18
"""Reading so many bytes of keys and values takes about as long as one more attention call."""
_BUCKET = 64
"""In deterministic mode a query at position p is shown so many keys, times the least factor that covers p."""


class PageTable:
    """The page table of one rank's cache: `num_rows` rows of page numbers, changed by plans only."""

    def __init__(self, cache: KVCache, *, num_rows: int, deterministic: bool = False) -> None:
        self._cache = cache
        self._deterministic = deterministic
        self._page_size = cache.page_size
        self._num_slots = cache.num_pages * cache.page_size
        self._waste = _CALL_BYTES // cache.bytes_per_slot  # keys read in vain that cost as much as a call
        self._dtype = cache.dtype
        self._device = cache.device
        self._pages: list[list[int]] = [[] for _ in range(num_rows)]
        self._num_neighbours = [0] * num_rows  # pages of each row, from its first, that lie one behind the other

    def set(self, row: int, index: int, page: int) -> None:
        """Entry `index` of a row, and the end of it: entry 0 begins a new sequence."""
        pages = self._pages[row]
        del pages[index:]
        is_neighbour = index == 0 or (self._num_neighbours[row] >= index and page == pages[-1] + 1)
        self._num_neighbours[row] = index + 1 if is_neighbour else min(index, self._num_neighbours[row])
        pages.append(page)

    def free(self, row: int) -> None:
        """The row holds no sequence any more."""
        self._pages[row] = []
        self._num_neighbours[row] = 0

    def covers(self, row: int, position: int) -> bool:
        """Whether the row has a page for its token at this position."""
        return position < len(self._pages[row]) * self._page_size

    @property
    def num_used(self) -> int:
        """Pages that rows refer to."""
        return len({page for row in self._pages for page in row})

    def slots(self, chunk: Chunk) -> list[int]:
        """Where a chunk's tokens live."""
        pages, size = self._pages[chunk.row], self._page_size
        return [pages[at // size] * size + at % size for at in range(chunk.start, chunk.start + len(chunk.tokens))]

    def spans(self, chunks: Items[Chunk]) -> tuple[Span, ...]:
        """The attention calls of a step, for the chunks in order; those of one token share calls where that pays."""
        spans = []
        at = first = 0
        while at < len(chunks):
            if self._deterministic:
                spans += self._fixed_spans(chunks[at], first)
                first += len(chunks[at].tokens)
                at += 1
                continue
            together = self._group(chunks, at)
            rows = slice(first, first + sum(len(chunk.tokens) for chunk in together))
            spans.append(self._span_of_one(together[0], rows) if len(together) == 1 else self._span(together, rows))
            at += len(together)
            first = rows.stop
        return tuple(spans)

    def _group(self, chunks: Items[Chunk], at: int) -> Items[Chunk]:
        """As many chunks of one token from `at` on as one call serves better than several."""
        end, longest, used = at + 1, chunks[at].start + 1, chunks[at].start + 1
        while end < len(chunks) and len(chunks[at].tokens) == len(chunks[end].tokens) == 1:
            count, length = end + 1 - at, chunks[end].start + 1
            longest, used = max(longest, length), used + length
            if count * longest - used > (count - 1) * self._waste or not self._fits(chunks, at, end, longest):
                break
            end += 1
        return chunks[at:end]

    def _is_run(self, chunk: Chunk) -> bool:
        """Whether all that the chunk's queries see lies side by side."""
        return chunk.start + len(chunk.tokens) <= self._num_neighbours[chunk.row] * self._page_size

    def _fits(self, chunks: Items[Chunk], at: int, end: int, longest: int) -> bool:
        """Whether chunk `end` is read in the same manner as those from `at` on, and as far from its neighbour."""
        is_run, before_is_run = self._is_run(chunks[end]), self._is_run(chunks[end - 1])
        if not is_run or not before_is_run:
            return is_run == before_is_run
        before = chunks[end - 1].row
        first = self._pages[chunks[end].row][0]
        distance = first - self._pages[before][0]
        is_even = end - at == 1 or distance == self._pages[before][0] - self._pages[chunks[end - 2].row][0]
        return distance > 0 and is_even and first * self._page_size + longest <= self._num_slots

    def _fixed_spans(self, chunk: Chunk, first: int) -> list[Span]:
        """Calls in which each query of a chunk sees a number of keys that depends on its position and nothing else."""
        spans = []
        position, end = chunk.start, chunk.start + len(chunk.tokens)
        while position < end:
            length = position // _BUCKET * _BUCKET + _BUCKET
            count = min(end, length) - position
            keys: Run | Pages
            start = self._pages[chunk.row][0] * self._page_size
            if self._is_run(chunk) and start + length <= self._num_slots:
                keys = Run(start, length, count=count)  # all of them read the same slots: no stride
            else:
                keys = self._gathered([chunk.row], length, count)
            positions = torch.arange(position, position + count, device=self._device)
            hidden = torch.arange(length, device=self._device) > positions.unsqueeze(1)
            rows = slice(first + position - chunk.start, first + position - chunk.start + count)
            spans.append(Span(rows, keys, mask=self._hide(hidden)[:, None, None, :], aligned=True))
            position += count
        return spans

    def _span_of_one(self, chunk: Chunk, rows: slice) -> Span:
        length = chunk.start + len(chunk.tokens)
        keys: Run | Pages
        if self._is_run(chunk):
            keys = Run(self._pages[chunk.row][0] * self._page_size, length)
        else:
            keys = self._gathered([chunk.row], length)
        if len(chunk.tokens) == 1:
            return Span(rows, keys)
        if chunk.start == 0:
            return Span(rows, keys, causal=True)
        positions = torch.arange(length, device=self._device)
        return Span(rows, keys, mask=self._hide(positions > positions[chunk.start :].unsqueeze(1)))

    def _span(self, chunks: Items[Chunk], rows: slice) -> Span:
        lengths = torch.tensor([chunk.start + 1 for chunk in chunks]).to(self._device, non_blocking=True)
        longest = max(chunk.start for chunk in chunks) + 1
        keys: Run | Pages
        if self._is_run(chunks[0]):
            first, second = (self._pages[chunk.row][0] * self._page_size for chunk in chunks[:2])
            keys = Run(first, longest, count=len(chunks), stride=second - first)
        else:
            keys = self._gathered([chunk.row for chunk in chunks], longest)
        hidden = torch.arange(longest, device=self._device) >= lengths.unsqueeze(1)
        return Span(rows, keys, mask=self._hide(hidden)[:, None, None, :])

    def _gathered(self, rows: list[int], length: int, count: int = 1) -> Pages:
        """The first `length` keys of each row, whatever lies behind the end of a shorter one; or one row, `count`
        times."""
        used = -(-length // self._page_size)
        table = [self._pages[row][:used] for row in rows]
        padded = torch.tensor([pages + [0] * (used - len(pages)) for pages in table])
        return self._cache.pages(padded.to(self._device, non_blocking=True), length, count)

    def _hide(self, hidden: Tensor) -> Tensor:
        """An additive mask: minus infinity where hidden."""
        return torch.zeros(hidden.shape, dtype=self._dtype, device=self._device).masked_fill_(hidden, float("-inf"))
