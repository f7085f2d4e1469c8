"""Lays out steps of few tokens for the compiled kernels: see `llama_tp.model.attention.base`."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from torch import Tensor

from llama_tp.model.attention.base import AttentionBackend, SequenceTokens, StepAttention
from llama_tp.model.kv_cache import KVCache, LayerCache

MAX_TOKENS = 16
"""Tokens of a step that the kernels compute."""


class KernelStep:
    """One step's layout: integers that the kernels read."""

    __slots__ = ("num_sequences", "num_units", "ranges", "sequences", "units")

    def __init__(self, sequences: Sequence[SequenceTokens], num_kv_heads: int, keys_per_part: int) -> None:
        table, ranges, units = array("i"), array("i"), array("i")
        first = 0
        for index, one in enumerate(sequences):
            length = one.start + one.num_tokens
            table.extend((first, one.num_tokens, one.start, len(ranges) // 2))
            for contiguous in one.pages.ranges(length, length):
                ranges.extend((contiguous.first, contiguous.length))
            for part in range((length - 1) // keys_per_part + 1):
                for head in range(num_kv_heads):
                    units.extend((index, head, part))
            first += one.num_tokens
        self.num_sequences = len(sequences)
        self.num_units = len(units) // 3
        self.sequences = table
        """For each sequence: its first token in the step, how many it has, their first position, its first range."""
        self.ranges = ranges
        """For each range of contiguous slots: the first, and how many."""
        self.units = units
        """For each unit of work: sequence, kv head, part of the keys."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, cache: LayerCache) -> Tensor:
        raise AssertionError("the kernels compute this step as a whole")


class KernelBackend:
    """Lays out steps of up to MAX_TOKENS for the kernels, others for another backend."""

    def __init__(self, other: AttentionBackend, cache: KVCache, keys_per_part: int) -> None:
        self._other = other
        self._num_kv_heads = cache.num_kv_heads
        self._keys_per_part = keys_per_part

    def prepare(self, sequences: Sequence[SequenceTokens], *, num_padding: int = 0) -> StepAttention:
        if num_padding or sum(one.num_tokens for one in sequences) > MAX_TOKENS:
            return self._other.prepare(sequences, num_padding=num_padding)
        return KernelStep(sequences, self._num_kv_heads, self._keys_per_part)
