"""Speculative decoding: a step computes a sequence's probable next tokens, its draft, along with its newest one.

Their logits show whether each is the token that would have been sampled there. Sampling goes on from one to the next
until it differs from the draft, so a step gives as many tokens as were predicted correctly, and one more. Each is
sampled from the same logits, by the same rules and with the same draws as without a draft, so the output is the same
(arXiv:2211.17192 proves it for drafts that are distributions; here they are single tokens, and nothing is resampled).
Keys and values of wrong drafts are overwritten later.

Policy only: no tensors.
"""

from __future__ import annotations

from collections.abc import Callable

from llama_tp.config import EngineConfig
from llama_tp.engine.prompt_lookup import PromptLookup
from llama_tp.engine.sequence import Sequence
from llama_tp.engine.step import Chunk

Share = tuple[Sequence, Chunk]


class Speculation:
    """Makes drafts, and counts how many were right."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self.num_drafted = 0
        """Tokens of all drafts."""
        self.num_accepted = 0
        """How many of them were right, and gave their step one more token."""

    def add_drafts(self, shares: list[Share], budget: int, extend: Callable[[Sequence, int], bool]) -> bool:
        """Append drafts of up to `budget` tokens to the chunks that end with a sequence's newest token. Returns whether
        there are any.

        extend: allocates pages for a sequence's first tokens as far as there are free ones. A prompt that is being
        scored gets no draft.
        """
        has_drafts = False
        for at, (sequence, chunk) in enumerate(shares):
            if sequence.num_uncomputed or sequence.scores is not None:
                continue
            if draft := self._draft(sequence, budget, extend):
                sequence.draft = draft
                shares[at] = sequence, chunk._replace(tokens=chunk.tokens + draft, num_logits=1 + len(draft))
                budget -= len(draft)
                has_drafts = True
        return has_drafts

    def _draft(self, sequence: Sequence, budget: int, extend: Callable[[Sequence, int], bool]) -> tuple[int, ...]:
        remaining = sequence.request.params.max_new_tokens - sequence.num_generated
        most = min(self._config.speculative_tokens, budget, remaining - 1)  # a step gives one token more than its draft
        if most < 1:
            return ()
        if sequence.lookup is None:
            sequence.lookup = PromptLookup()
        draft = sequence.lookup.draft(sequence.tokens, most)
        if draft and not extend(sequence, len(sequence.tokens) + len(draft)):
            draft = draft[: len(sequence.pages) * self._config.page_size - len(sequence.tokens)]
        self.num_drafted += len(draft)
        return draft

    def accept(self, sequence: Sequence) -> bool:
        """Whether the sequence has not ended, and has just sampled the next token of its draft, which the step has then
        computed, too. Otherwise drops the draft."""
        draft, sequence.draft = sequence.draft, ()
        if sequence.row < 0 or sequence.tokens[-1] != draft[0]:
            return False
        sequence.draft = draft[1:]
        sequence.num_computed += 1
        self.num_accepted += 1
        return True
