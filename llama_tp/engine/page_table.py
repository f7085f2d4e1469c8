"""Where each row's tokens lie in the KV cache, and how a step's queries reach them in the fewest attention calls.

Neighbouring pages (a run) are read in place, as a slice; runs at equal distances are read in place together, as one
strided view. A row of several runs is read run by run, and the runs before its last one are read once for all rows that
share them. Only what that would break into too many calls is gathered.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass

import torch
from torch import Tensor

from llama_tp.engine.request import Chunk
from llama_tp.model.attention import Span
from llama_tp.model.kv_cache import KVCache, Pages, Run

_CALL_BYTES = 1 << 18
"""Reading so many bytes of keys and values takes about as long as one more attention call."""
_GATHER_BYTES = 3 << 18
"""Gathering so many takes about as long as one more run: a call, and adding its result to the others'."""
_MOST_RUNS = 8
"""A sequence of more runs is gathered in any case."""
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
        self._few = _GATHER_BYTES // cache.bytes_per_slot
        self._dtype = cache.dtype
        self._device = cache.device
        self._pages: list[list[int]] = [[] for _ in range(num_rows)]
        self._starts: list[list[int]] = [[] for _ in range(num_rows)]  # of each row: indices where its runs begin

    def set(self, row: int, index: int, page: int) -> None:
        """Entry `index` of a row, and the end of it: entry 0 begins a new sequence."""
        pages, starts = self._pages[row], self._starts[row]
        del pages[index:]
        while starts and starts[-1] >= index:
            starts.pop()
        if not pages or page != pages[-1] + 1:
            starts.append(index)
        pages.append(page)

    def free(self, row: int) -> None:
        """The row holds no sequence any more."""
        self._pages[row] = []
        self._starts[row] = []

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
        spans: list[Span] = []
        first = 0
        if self._deterministic:
            for chunk in chunks:
                spans += self._fixed_spans(chunk, first)
                first += len(chunk.tokens)
            return tuple(spans)
        groups = _fold([self._group(chunk) for chunk in chunks], self._are_even)
        for group in _fold([self._placed(group) for group in groups], self._are_scattered):
            end = first + sum(len(chunk.tokens) for chunk in group.chunks)
            spans.append(self._span(group, slice(first, end)))
            first = end
        return tuple(spans)

    def _group(self, chunk: Chunk) -> _Group:
        length = chunk.start + len(chunk.tokens)
        runs = self._runs(chunk.row, length, _MOST_RUNS if self._can_read_runs(chunk) else 1)
        if not runs:
            return _Group([chunk], (), [], longest=length, used=length, is_scattered=True)
        *shared, own = runs
        return _Group([chunk], tuple(shared), [own.first], longest=own.length, used=own.length)

    def _can_read_runs(self, chunk: Chunk) -> bool:
        """Whether attention can add up what it finds in several places."""
        return self._device.type == "cpu" and len(chunk.tokens) == 1

    def _runs(self, row: int, length: int, most: int) -> list[Run]:
        """Where a row's first `length` tokens lie; nothing if that is in more than so many runs."""
        pages, size = self._pages[row], self._page_size
        starts = self._starts[row]
        num = bisect_left(starts, -(-length // size))
        if num > most:
            return []
        ends = [*(start * size for start in starts[1:num]), length]
        return [Run(pages[start] * size, end - start * size) for start, end in zip(starts[:num], ends, strict=True)]

    def _are_even(self, one: _Group, two: _Group) -> bool:
        """Whether both read the same shared runs, and what else they read lies at even distances, in one call."""
        if one.is_scattered or two.is_scattered or one.shared != two.shared or not self._pays(one, two):
            return False
        distance = two.firsts[0] - one.firsts[-1]
        is_even = len(one.firsts) == 1 or distance == one.firsts[-1] - one.firsts[-2]
        return distance > 0 and is_even and two.firsts[0] + max(one.longest, two.longest) <= self._num_slots

    def _are_scattered(self, one: _Group, two: _Group) -> bool:
        return one.is_scattered and two.is_scattered and self._pays(one, two)

    def _pays(self, one: _Group, two: _Group) -> bool:
        """Whether one call for both takes no longer than two."""
        if len(one.chunks[0].tokens) > 1 or len(two.chunks[0].tokens) > 1:
            return False
        count = len(one.chunks) + len(two.chunks)
        in_vain = count * max(one.longest, two.longest) - one.used - two.used
        return in_vain <= (count - 1) * self._waste

    def _placed(self, group: _Group) -> _Group:
        """The group as it is best read: with its runs gathered where they hold too little."""
        if not group.shared:
            return group
        shared = sum(run.length for run in group.shared)
        used = len(group.chunks) * shared + group.used
        if used > len(group.shared) * self._few:
            return group
        return _Group(group.chunks, (), [], longest=shared + group.longest, used=used, is_scattered=True)

    def _span(self, group: _Group, rows: slice) -> Span:
        chunk, *others = group.chunks
        keys: Run | Pages
        if group.is_scattered:
            keys = self._gathered([chunk.row for chunk in group.chunks], group.longest)
        elif others:
            keys = Run(group.firsts[0], group.longest, len(group.firsts), group.firsts[1] - group.firsts[0])
        else:
            keys = Run(group.firsts[0], group.longest)
        if others:
            shared = sum(run.length for run in group.shared)
            lengths = torch.tensor([chunk.start + 1 - shared for chunk in group.chunks])
            lengths = lengths.to(self._device, non_blocking=True).unsqueeze(1)
            hidden = torch.arange(group.longest, device=self._device) >= lengths
            return Span(rows, keys, group.shared, mask=self._hide(hidden)[:, None, None, :])
        if len(chunk.tokens) == 1:
            return Span(rows, keys, group.shared)
        if chunk.start == 0:
            return Span(rows, keys, causal=True)
        positions = torch.arange(group.longest, device=self._device)
        return Span(rows, keys, mask=self._hide(positions > positions[chunk.start :].unsqueeze(1)))

    def _fixed_spans(self, chunk: Chunk, first: int) -> list[Span]:
        """Calls in which each query of a chunk sees a number of keys that depends on its position and nothing else."""
        spans = []
        position, end = chunk.start, chunk.start + len(chunk.tokens)
        while position < end:
            length = position // _BUCKET * _BUCKET + _BUCKET
            count = min(end, length) - position
            keys: Run | Pages
            runs = self._runs(chunk.row, end, most=1)
            if runs and runs[0].first + length <= self._num_slots:
                keys = Run(runs[0].first, length, count=count)  # all of them read the same slots: no stride
            else:
                keys = self._gathered([chunk.row], length, count)
            positions = torch.arange(position, position + count, device=self._device)
            hidden = torch.arange(length, device=self._device) > positions.unsqueeze(1)
            rows = slice(first + position - chunk.start, first + position - chunk.start + count)
            spans.append(Span(rows, keys, mask=self._hide(hidden)[:, None, None, :], aligned=True))
            position += count
        return spans

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


@dataclass(slots=True)
class _Group:
    """Chunks that one span computes: a prompt's, or one token each of several sequences."""

    chunks: list[Chunk]
    shared: tuple[Run, ...]
    """What all of them see."""
    firsts: list[int]
    """The slots where what each of them sees besides begins; it lies in one run, except if it is scattered."""
    longest: int
    """The most that one of them sees besides."""
    used: int
    """What all of them see besides."""
    is_scattered: bool = False

    def absorb(self, other: _Group) -> None:
        self.chunks += other.chunks
        self.firsts += other.firsts
        self.longest = max(self.longest, other.longest)
        self.used += other.used


def _fold(groups: list[_Group], fit: Callable[[_Group, _Group], bool]) -> list[_Group]:
    """The groups in order, neighbours that fit made one."""
    folded = groups[:1]
    for group in groups[1:]:
        if fit(folded[-1], group):
            folded[-1].absorb(group)
        else:
            folded.append(group)
    return folded
