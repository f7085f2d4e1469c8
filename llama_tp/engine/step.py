"""One step as the leader sends it to every rank. Plain integers: no text, no tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Chunk(NamedTuple):
    """One sequence's share of a step: compute `tokens` at positions start, start + 1, ...

    A tuple, because every rank creates one per sequence and step, and a frozen dataclass takes three times as long.
    """

    row: int
    start: int
    tokens: tuple[int, ...]
    num_logits: int
    """How many of its last tokens' logits are needed: 0, 1 to sample the next token, or more to score a prompt."""


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Everything a rank needs to execute one step. Decided by the leader, the same on every rank."""

    step: int
    """Number of the step, from 1; 0 if `stop`."""
    chunks: tuple[Chunk, ...] = ()
    page_updates: tuple[tuple[int, int, int], ...] = ()
    """(row, index, page): entries of the page table that changed since the last plan, after `freed`."""
    freed: tuple[int, ...] = ()
    """Table rows that no longer have a sequence."""
    digest: int | None = None
    """The leader's digest of all plans before this one. None: ranks are not compared in this step."""
    stop: bool = False
    """The leader releases its followers."""
