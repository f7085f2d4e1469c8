"""What one forward pass computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from llama_tp.model.attention.base import StepAttention


@dataclass(frozen=True, slots=True)
class Batch:
    """A flat list of T tokens, and how they attend."""

    tokens: Tensor
    """(T,) ids."""
    rope: Tensor
    """(T, 1, d / 2) rotations of the tokens' positions."""
    attention: StepAttention
    sampled: Tensor
    """Indices of the tokens whose logits are wanted; may be empty."""


class Output(NamedTuple):
    """What comes of it."""

    logits: Tensor | None
    """Float32 (sampled tokens, V); None if none is sampled."""
    is_finite: Tensor
    """(T,) whether the token's last hidden state is finite. What was not never reached the cache."""
