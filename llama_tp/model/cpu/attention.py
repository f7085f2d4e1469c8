"""Lays out steps for the compiled kernels: see `llama_tp.model.attention.base`."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from llama_tp.model.attention.base import SequenceTokens
from llama_tp.model.cpu.buffers import MAX_TOKENS
from llama_tp.model.cpu.library import Library, StepStruct
from llama_tp.model.kv_cache import KVCache, LayerCache


def max_tokens(dtype: torch.dtype) -> int:
    """Tokens of a step that the kernels compute as a whole."""
    return MAX_TOKENS[str(dtype).removeprefix("torch.")]


class KernelStep:
    """One step's layout: integers that the kernels read."""

    __slots__ = ("_blocks", "_ranges", "_table", "_units", "is_whole")

    def __init__(self, sequences: Sequence[SequenceTokens], cache: KVCache, library: Library) -> None:
        self.is_whole = sum(one.num_tokens for one in sequences) <= max_tokens(cache.dtype)
        """Whether the kernels compute all of the step."""
        # Per sequence: its first token in the step, how many it has, their first position, its first range.
        self._table = array("i")
        # Per range of contiguous slots: the first, and how many.
        self._ranges = array("i")
        # Units of work. Of whole steps: sequence, kv head, part of the keys. Of others: sequence, and which of its
        # tokens in the step is the block's first.
        self._units, self._blocks = array("i"), array("i")
        first = 0
        for index, one in enumerate(sequences):
            length = one.start + one.num_tokens
            self._table.extend((first, one.num_tokens, one.start, len(self._ranges) // 2))
            for contiguous in one.pages.ranges(length, length):
                self._ranges.extend((contiguous.first, contiguous.length))
            if self.is_whole:
                for part in range((length - 1) // library.keys_per_part + 1):
                    for head in range(cache.num_kv_heads):
                        self._units.extend((index, head, part))
            else:
                for token in range(0, one.num_tokens, library.tokens_per_block):
                    self._blocks.extend((index, token))
            first += one.num_tokens

    def fill(self, step: StepStruct) -> None:
        """Let the struct point to this layout, which must outlive it."""
        step.num_units, step.num_blocks = len(self._units) // 3, len(self._blocks) // 2
        step.sequences, step.ranges = self._table.buffer_info()[0], self._ranges.buffer_info()[0]
        step.units, step.blocks = self._units.buffer_info()[0], self._blocks.buffer_info()[0]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, cache: LayerCache) -> Tensor:
        raise AssertionError("only the kernels can compute this step's attention")


class KernelBackend:
    """Lays out steps of one cache for the kernels."""

    def __init__(self, cache: KVCache, library: Library) -> None:
        self._cache = cache
        self._library = library

    def prepare(self, sequences: Sequence[SequenceTokens], *, num_padding: int = 0) -> KernelStep:
        assert num_padding == 0
        return KernelStep(sequences, self._cache, self._library)
