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

    __slots__ = ("_blocks", "_num_sequences", "_num_units", "_ranges", "_sequences", "is_whole")

    def __init__(self, sequences: Sequence[SequenceTokens], cache: KVCache, library: Library) -> None:
        self.is_whole = sum([one.num_tokens for one in sequences]) <= max_tokens(cache.dtype)
        """Whether the kernels compute all of the step."""
        # Per sequence: its first token in the step, how many it has, their first position, its first range and unit.
        self._sequences = array("i")
        # Per range of contiguous slots: the first, and how many.
        self._ranges = array("i")
        # Of steps of many tokens. Per block: the sequence, and which of its tokens in the step is the first.
        self._blocks = array("i")
        self._num_sequences, self._num_units = len(sequences), 0
        token = 0
        for index, (pages, start, num_tokens) in enumerate(sequences):
            self._sequences.extend((token, num_tokens, start, len(self._ranges) // 2, self._num_units))
            self._ranges.extend(pages.ranges)
            token += num_tokens
            if self.is_whole:
                self._num_units += -(-(start + num_tokens) // library.keys_per_part) * cache.num_kv_heads
            else:
                for first in range(0, num_tokens, library.tokens_per_block):
                    self._blocks.extend((index, first))

    def fill(self, step: StepStruct) -> None:
        """Let the struct point to this layout, which must outlive it."""
        step.num_sequences, step.num_units = self._num_sequences, self._num_units
        step.num_blocks = len(self._blocks) // 2
        step.sequences, step.ranges = self._sequences.buffer_info()[0], self._ranges.buffer_info()[0]
        step.blocks = self._blocks.buffer_info()[0]

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
