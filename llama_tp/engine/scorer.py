"""Logits of a prompt's tokens -> log probabilities of the tokens after them, under the unmodified distribution.

Legend: R logits of a step, L targets of a span, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Items

import torch
from torch import Tensor

from llama_tp.engine.request import Logprobs
from llama_tp.engine.sequence import Span

_BLOCK = 16
"""Logits that are scored at a time."""


def score(logits: Tensor, spans: Items[Span]) -> list[list[Logprobs]]:
    """For each span, the log probabilities of its targets from float32 logits (R, V). NaN where logits are not
    finite."""
    return [_score(logits[span.row : span.row + len(span.targets)], span) for span in spans]


def _score(logits: Tensor, span: Span) -> list[Logprobs]:
    """Of one span, from its logits (L, V)."""
    targets = torch.tensor(span.targets, dtype=torch.int64).to(logits.device, non_blocking=True).unsqueeze(-1)
    num_top = min(span.sequence.request.params.prompt_logprobs or 0, logits.size(-1))
    # In blocks, because the intermediate results are as large as the logits.
    blocks = zip(logits.split(_BLOCK), targets.split(_BLOCK), strict=True)
    rows = torch.cat([_pack(*block, num_top) for block in blocks]).tolist() if span.targets else []
    return [
        Logprobs(chosen, tuple(zip(map(int, tail[num_top:]), tail[:num_top], strict=True)), int(rank))
        for chosen, rank, *tail in rows
    ]


def _pack(logits: Tensor, targets: Tensor, num_top: int) -> Tensor:
    """Log probability and rank of each target, then the highest log probabilities and their ids: (L, 2 + 2 * num_top),
    in float64, which represents float32, ranks and token ids exactly."""
    total = logits.logsumexp(dim=-1, keepdim=True)
    total = total.where(total.isfinite(), torch.nan)
    chosen = logits.gather(-1, targets)  # (L, 1)
    ranks = 1 + (logits > chosen).sum(dim=-1, keepdim=True)
    values, tokens = logits.topk(num_top, dim=-1)
    return torch.cat([part.double() for part in (chosen - total, ranks, values - total, tokens)], dim=-1)
