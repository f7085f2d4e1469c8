"""Plans the attention calls of a step: as few as possible without copying much.

Contiguous pages (a range) are read in place, as a slice; equally spaced ranges are read in place together, as one
strided view. A sequence of several ranges is read range by range, and all but its last range are read once for all
sequences that share them. Keys are gathered only where this would take too many calls.

Legend: B sequences, G query heads per kv head, S keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llama_tp.model.attention.base import SequenceTokens
from llama_tp.model.kv_cache import GatheredPages, KVCache, SlotRange

_BUCKET = 64
"""In deterministic mode, a query at position p sees the smallest multiple of this many keys that covers p."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SdpaCosts:
    """The trade-off between more calls and more bytes, measured on CPUs (docs/performance.md)."""

    call_bytes: int = 1 << 18
    """Bytes of keys and values that are read in about the time of one more attention call."""
    gather_bytes: int = 3 << 18
    """Bytes of keys and values that are gathered in about the time of one more range: a call, and merging."""
    max_ranges: int = 8
    """A sequence with more ranges is always gathered."""
    upcast_elements: int = 1 << 23
    """Elements of keys and values to upcast at a time if the CPU lacks half precision; at least one head."""


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """The queries of one sequence, or one query each of several sequences."""

    tokens: slice
    """The step's tokens that these queries belong to."""
    keys: SlotRange | GatheredPages
    """Read in place, or gathered."""
    shared: tuple[SlotRange, ...] = ()
    """More keys that all the queries see. Only for one query per sequence, and if results can be merged."""
    mask: Tensor | None = None
    """Additive, broadcastable to the scores with `keys`; None: every query sees every key."""
    causal: bool = False
    """Query i sees keys 0 .. i: a prompt from its start."""
    aligned: bool = False
    """Pad every kv head's queries, so that results do not depend on which thread computes them (see sdpa.py)."""


class CallPlanner:
    """Plans the calls of one cache's steps. `can_merge`: whether results over several ranges can be merged."""

    def __init__(self, cache: KVCache, costs: SdpaCosts, *, can_merge: bool) -> None:
        self._cache = cache
        self._costs = costs
        self._can_merge = can_merge
        self._num_slots = cache.num_pages * cache.page_size
        # Numbers of keys in one layer.
        self._call_keys = costs.call_bytes // cache.bytes_per_slot
        self._gather_keys = costs.gather_bytes // cache.bytes_per_slot

    def plan(self, sequences: Sequence[SequenceTokens]) -> list[AttentionCall]:
        """The calls for the sequences, in order; sequences with one token share calls if that is faster."""
        calls: list[AttentionCall] = []
        first = 0
        groups = _fold([self._group(one) for one in sequences], self._can_be_read_together)
        for group in _fold([self._gathered_if_cheaper(group) for group in groups], self._can_be_gathered_together):
            end = first + sum(one.num_tokens for one in group.sequences)
            calls.append(self._call(group, slice(first, end)))
            first = end
        return calls

    def plan_fixed(self, sequences: Sequence[SequenceTokens]) -> list[AttentionCall]:
        """Calls in which the number of keys for each query depends only on its position."""
        calls: list[AttentionCall] = []
        first = 0
        for one in sequences:
            calls += self._fixed_calls(one, first)
            first += one.num_tokens
        return calls

    def _group(self, one: SequenceTokens) -> _Group:
        length = one.start + one.num_tokens
        limit = self._costs.max_ranges if self._can_merge and one.num_tokens == 1 else 1
        ranges = one.pages.ranges_of(length, limit)
        if not ranges:
            return _Group([one], (), [], longest=length, used=length, is_scattered=True)
        *shared, own = ranges
        return _Group([one], tuple(shared), [own.first], longest=own.length, used=own.length)

    def _can_be_read_together(self, one: _Group, two: _Group) -> bool:
        """Whether one call can read both: same shared ranges, and their own keys equally spaced."""
        if one.is_scattered or two.is_scattered or one.shared != two.shared or not self._pays(one, two):
            return False
        distance = two.firsts[0] - one.firsts[-1]
        is_even = len(one.firsts) == 1 or distance == one.firsts[-1] - one.firsts[-2]
        return distance > 0 and is_even and two.firsts[0] + max(one.longest, two.longest) <= self._num_slots

    def _can_be_gathered_together(self, one: _Group, two: _Group) -> bool:
        return one.is_scattered and two.is_scattered and self._pays(one, two)

    def _pays(self, one: _Group, two: _Group) -> bool:
        """Whether one call for both is no slower than two."""
        if one.sequences[0].num_tokens > 1 or two.sequences[0].num_tokens > 1:
            return False
        count = len(one.sequences) + len(two.sequences)
        masked = count * max(one.longest, two.longest) - one.used - two.used
        return masked <= (count - 1) * self._call_keys

    def _gathered_if_cheaper(self, group: _Group) -> _Group:
        """The group, gathered if its ranges are too short."""
        if not group.shared:
            return group
        shared = sum(one.length for one in group.shared)
        used = len(group.sequences) * shared + group.used
        if used > len(group.shared) * self._gather_keys:
            return group
        return _Group(group.sequences, (), [], longest=shared + group.longest, used=used, is_scattered=True)

    def _call(self, group: _Group, tokens: slice) -> AttentionCall:
        one, *others = group.sequences
        keys: SlotRange | GatheredPages
        if group.is_scattered:
            keys = self._gather(group.sequences, group.longest)
        elif others:
            keys = SlotRange(group.firsts[0], group.longest, len(group.firsts), group.firsts[1] - group.firsts[0])
        else:
            keys = SlotRange(group.firsts[0], group.longest)
        device = self._cache.device
        if others:
            shared = sum(one.length for one in group.shared)
            lengths = torch.tensor([one.start + 1 - shared for one in group.sequences])
            lengths = lengths.to(device, non_blocking=True).unsqueeze(1)
            hidden = torch.arange(group.longest, device=device) >= lengths
            return AttentionCall(tokens, keys, group.shared, mask=self._hide(hidden)[:, None, None, :])
        if one.num_tokens == 1:
            return AttentionCall(tokens, keys, group.shared)
        if one.start == 0:
            return AttentionCall(tokens, keys, causal=True)
        positions = torch.arange(group.longest, device=device)
        return AttentionCall(tokens, keys, mask=self._hide(positions > positions[one.start :].unsqueeze(1)))

    def _fixed_calls(self, one: SequenceTokens, first: int) -> list[AttentionCall]:
        device = self._cache.device
        calls = []
        position, end = one.start, one.start + one.num_tokens
        while position < end:
            length = position // _BUCKET * _BUCKET + _BUCKET
            count = min(end, length) - position
            keys: SlotRange | GatheredPages
            ranges = one.pages.ranges_of(end, limit=1)
            if ranges and ranges[0].first + length <= self._num_slots:
                keys = SlotRange(ranges[0].first, length, count=count)  # all read the same slots: no stride
            else:
                keys = self._gather([one], length, count)
            positions = torch.arange(position, position + count, device=device)
            hidden = torch.arange(length, device=device) > positions.unsqueeze(1)
            at = first + position - one.start
            mask = self._hide(hidden)[:, None, None, :]
            calls.append(AttentionCall(slice(at, at + count), keys, mask=mask, aligned=True))
            position += count
        return calls

    def _gather(self, sequences: Sequence[SequenceTokens], length: int, count: int = 1) -> GatheredPages:
        """The first `length` keys of each sequence, with arbitrary keys after the end of a shorter one; or of one
        sequence, `count` times."""
        used = -(-length // self._cache.page_size)
        table = [one.pages.pages[:used] for one in sequences]
        padded = torch.tensor([pages + [0] * (used - len(pages)) for pages in table])
        return self._cache.gathered(padded.to(self._cache.device, non_blocking=True), length, count)

    def _hide(self, hidden: Tensor) -> Tensor:
        """An additive mask: minus infinity where hidden."""
        zeros = torch.zeros(hidden.shape, dtype=self._cache.dtype, device=self._cache.device)
        return zeros.masked_fill_(hidden, float("-inf"))


@dataclass(slots=True)
class _Group:
    """Sequences computed by one call: a prompt, or several sequences with one token each."""

    sequences: list[SequenceTokens]
    shared: tuple[SlotRange, ...]
    """Keys that all sequences see."""
    firsts: list[int]
    """First slot of each sequence's own keys, one range each; empty if the group is scattered."""
    longest: int
    """Maximum number of own keys of any sequence."""
    used: int
    """Total number of own keys."""
    is_scattered: bool = False

    def absorb(self, other: _Group) -> None:
        self.sequences += other.sequences
        self.firsts += other.firsts
        self.longest = max(self.longest, other.longest)
        self.used += other.used


def _fold(groups: list[_Group], fit: Callable[[_Group, _Group], bool]) -> list[_Group]:
    """The groups in order, merging adjacent ones that fit."""
    folded = groups[:1]
    for group in groups[1:]:
        if fit(folded[-1], group):
            folded[-1].absorb(group)
        else:
            folded.append(group)
    return folded
