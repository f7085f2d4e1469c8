"""One request among others, and the logits that its tokens were sampled from: deterministic mode is about these."""

from __future__ import annotations

import torch
from torch import Tensor

from llama_tp.engine.engine import Engine
from llama_tp.engine.request import Request
from llama_tp.engine.sampling_params import SamplingParams

PROMPT = [(7 * i * i + 3) % 500 for i in range(150)]
GREEDY = SamplingParams(temperature=0, max_new_tokens=30)


def logits_of(engine: Engine, others: list[list[int]]) -> Tensor:
    """What each token of PROMPT's continuation was sampled from, while the engine continues the others, too."""
    seen = []
    sample = engine.sampler.sample

    def watch(logits, sequences):
        seen.extend(row.clone() for row, one in zip(logits, sequences, strict=True) if one.request.id == "watched")
        return sample(logits, sequences)

    engine.sampler.sample = watch
    for i, prompt in enumerate(others):
        engine.add(Request(f"other {i}", tuple(prompt), GREEDY.but(max_new_tokens=20 + i)))
    for _ in range(3 if others else 0):
        engine.step()
    engine.add(Request("watched", tuple(PROMPT), GREEDY))
    while engine.num_requests:
        engine.step()
    assert len(seen) == 30
    return torch.stack(seen)
