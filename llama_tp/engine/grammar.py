"""The interface to what a sequence must match."""

from __future__ import annotations

from typing import Protocol


class GrammarState(Protocol):
    """How far one sequence has come in its grammar."""

    @property
    def has_failed(self) -> bool:
        """Whether no mask can be computed any more; the last one is empty."""

    def accept(self, token_id: int) -> None:
        """The sequence's next token."""

    def fill_mask(self, address: int, num_bytes: int) -> None:
        """Write the mask: bit i % 8 of byte i // 8 tells whether token i may come next."""


class TokenGrammar(Protocol):
    """What sequences may consist of; shared by any number of them."""

    num_tokens: int
    """In the vocabulary; more are never allowed."""

    def start(self) -> GrammarState:
        """The state of a sequence without tokens."""
