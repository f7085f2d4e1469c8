"""The interface between an attention backend, the model and the runner.

Once per step a backend lays out the step's sequences; each layer then stores its keys and values and attends, without
further decisions.

Legend: T tokens of the step, H heads, K kv heads, d head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from llama_tp.model.kv_cache import LayerCache, PageList


class SequenceTokens(NamedTuple):
    """One sequence's tokens in a step: positions start .. start + num_tokens - 1."""

    pages: PageList
    """Cover all these positions."""
    start: int
    num_tokens: int


class StepAttention(Protocol):
    """A step's layout."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, cache: LayerCache) -> Tensor:
        """Store k and v (T, K, d), then attend with q (T, H, d): every token sees its own sequence up to itself.
        q and k are already rotated. Returns (T, H, d)."""
        ...


class AttentionBackend(Protocol):
    """Lays out steps for one cache."""

    def prepare(self, sequences: Sequence[SequenceTokens], *, num_padding: int = 0) -> StepAttention:
        """The layout of a step whose T tokens are those of the sequences, in order, then `num_padding` padding
        tokens."""
        ...
