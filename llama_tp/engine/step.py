"""One step as the leader sends it to every rank. Plain integers: no text, no tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Chunk(NamedTuple):
    """One sequence's share of a step: compute `tokens` at positions start, start + 1, ...

    A tuple, because every rank makes one for each sequence and step, and a frozen dataclass takes three times as long.
    """

    row: int
    start: int
    tokens: tuple[int, ...]
    sample: bool
    """Whether logits of the last token are wanted."""


@dataclass(frozen=True, slots=True)
class StepPlan:
    """All that a rank needs to execute one step. Decided by the leader, the same on every rank."""

    step: int
    """Number of the step, counted from 1; 0 in plans that compute nothing."""
    chunks: tuple[Chunk, ...] = ()
    page_updates: tuple[tuple[int, int, int], ...] = ()
    """(row, index, page): entries of the page table that changed since the last plan, after `freed`."""
    freed: tuple[int, ...] = ()
    """Rows of the page table that hold no sequence any more."""
    digest: int | None = None
    """The leader's digest of all plans before this one. None: no ranks are compared now."""
    stop: bool = False
    """The leader releases its followers."""
