"""Logits and per-request parameters -> token ids.

Order of operations: temperature, then top_k, then top_p, then min_p, each on what the one before it left, then one
draw. Every request has a generator of its own, so its draws do not depend on who shares the batch. Greedy rows touch
no generator.

Legend: R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Items

import torch
from torch import Tensor

from llama_tp.engine.request import SamplingParams, Sequence


class Sampler:
    """Keeps one generator per sampled request."""

    def __init__(self) -> None:
        self._generators: dict[str, torch.Generator] = {}

    def sample(self, logits: Tensor, sequences: Items[Sequence]) -> list[int | None]:
        """One id per row of float32 logits (R, V); None where the row's logits are not finite."""
        best, ids = logits.max(dim=-1)  # a NaN or +inf anywhere in a row shows in its maximum
        finite = best.isfinite()
        drawn = [row for row, sequence in enumerate(sequences) if not sequence.request.params.is_greedy]
        if drawn:
            rows = torch.tensor(drawn, device=logits.device)
            params = [sequences[row].request.params for row in drawn]
            probs = probabilities(logits[rows], params)
            noise = torch.stack([self._noise(sequences[row], probs) for row in drawn])
            ids[rows] = (probs / noise).argmax(dim=-1)  # the winner of an exponential race is a draw from probs
        return [token if ok else None for token, ok in zip(ids.tolist(), finite.tolist(), strict=True)]

    def forget(self, request_id: str) -> None:
        """The request has ended."""
        self._generators.pop(request_id, None)

    def _noise(self, sequence: Sequence, like: Tensor) -> Tensor:
        """Exponential(1) variates (V,) from the request's generator."""
        request = sequence.request
        generator = self._generators.get(request.id)
        if generator is None:
            generator = torch.Generator(like.device)
            if request.params.seed is None:
                generator.seed()
            else:
                generator.manual_seed(request.params.seed)
            self._generators[request.id] = generator
        return torch.empty(like.size(-1), device=like.device).exponential_(generator=generator)


def probabilities(logits: Tensor, params: Items[SamplingParams]) -> Tensor:
    """The distributions (R, V) that rows of float32 logits are drawn from, filtered as each row's parameters say."""

    def column(values: Items[float]) -> Tensor:
        return torch.tensor(values, device=logits.device).unsqueeze(-1)  # (R, 1)

    probs = torch.softmax(logits / column([p.temperature for p in params]), dim=-1)
    if any(p.top_k or p.top_p < 1 for p in params):
        ordered, order = probs.sort(dim=-1, descending=True, stable=True)
        ranks = torch.arange(ordered.size(-1), device=logits.device)
        ordered = ordered.masked_fill(ranks >= column([p.top_k or ordered.size(-1) for p in params]), 0)
        ordered = ordered / ordered.sum(dim=-1, keepdim=True)
        before = ordered.cumsum(dim=-1) - ordered  # what more probable tokens add up to
        tail = before >= column([p.top_p if p.top_p < 1 else 2.0 for p in params])
        ordered = ordered.masked_fill(tail & (ranks > 0), 0)
        probs = torch.zeros_like(probs).scatter_(-1, order, ordered)
    if any(p.min_p for p in params):
        floor = probs.amax(dim=-1, keepdim=True) * column([p.min_p for p in params])
        probs = probs.masked_fill(probs < floor, 0)
    return probs
