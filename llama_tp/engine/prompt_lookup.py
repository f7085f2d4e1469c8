"""Predicts a sequence's next tokens from its own tokens: what followed the last n of them earlier (prompt lookup).

Summaries, edited text and code repeat long parts of the prompt, so the prediction is often right there. It needs no
second model (https://github.com/apoorvumang/prompt-lookup-decoding).
"""

from __future__ import annotations

from collections.abc import Sequence as Items

SIZES = (3, 2)
"""Lengths n of the n-grams that are looked up, in this order."""


class PromptLookup:
    """An index of one sequence's n-grams.

    It grows with the sequence: each token is indexed once, so a draft costs no scan of the context. `sizes`: see SIZES.
    """

    def __init__(self, sizes: Items[int] = SIZES) -> None:
        self._sizes = tuple(sizes)
        self._followers: dict[tuple[int, ...], int] = {}  # n-gram -> position of the token after its newest occurrence
        self._num_indexed = 0

    def draft(self, tokens: list[int], most: int) -> tuple[int, ...]:
        """Up to `most` tokens that probably follow `tokens`, which must begin with those of the last call.

        They are those after the newest earlier occurrence of the longest of the n-grams that `tokens` ends with. An
        occurrence less than `most` tokens ago shows a repetition, which is continued. Empty if there is none.
        """
        self._index(tokens)
        for size in self._sizes:
            if (at := self._followers.get(tuple(tokens[-size:]))) is not None:
                found = tokens[at : at + most]
                return tuple(found[i % len(found)] for i in range(most))
        return ()

    def _index(self, tokens: list[int]) -> None:
        """Index the n-grams that precede the tokens added since the last call: the last n-gram precedes none yet."""
        for at in range(self._num_indexed, len(tokens)):
            for size in self._sizes:
                if size <= at:
                    self._followers[tuple(tokens[at - size : at])] = at
        self._num_indexed = len(tokens)
