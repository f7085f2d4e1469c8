"""Random texts of a grammar, to see what it allows."""

from __future__ import annotations

import torch


def mask_of(state, num_tokens):
    """The ids that the state allows."""
    bits = torch.zeros(-(-num_tokens // 32), dtype=torch.int32)
    state.fill_mask(bits.data_ptr(), bits.nbytes)
    words = bits.unsqueeze(-1) >> torch.arange(32, dtype=torch.int32)
    return (words & 1).bool().flatten()[:num_tokens].nonzero().flatten().tolist()


def random_text(grammar, tokenizer, generator, *, longest=200):
    """A text of random tokens that the grammar allows; None if it does not end."""
    state, ids = grammar.start(), []
    for _ in range(longest):
        allowed = mask_of(state, grammar.num_tokens)
        assert allowed, "there is always a next token"
        ends = tokenizer.stop_ids.intersection(allowed)
        if ends and (len(ends) == len(allowed) or torch.rand((), generator=generator) < 0.3):
            return tokenizer.decode(ids)
        inside = [token for token in allowed if token not in tokenizer.stop_ids]
        ids.append(inside[int(torch.randint(len(inside), (), generator=generator))])
        state.accept(ids[-1])
    return None
