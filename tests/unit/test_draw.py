"""Drawing without sorting the vocabulary is drawing from the filtered distribution."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_tp.engine import draw as module
from llama_tp.engine.draw import candidates, draw
from llama_tp.engine.sampler import probabilities
from llama_tp.engine.sampling_params import SamplingParams


def filtered(logits: torch.Tensor, params: SamplingParams) -> tuple[torch.Tensor, torch.Tensor]:
    """The distribution by the definition, and as `candidates` leaves it."""
    probs = torch.softmax(logits / params.temperature, dim=-1).numpy()
    ids, kept = candidates(probs, params)
    ours = torch.zeros(len(probs))
    ours[torch.from_numpy(ids)] = torch.from_numpy(np.ascontiguousarray(kept))
    theirs = probabilities(logits.unsqueeze(0), [params])[0]
    return ours / ours.sum(), theirs / theirs.sum()


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    scale=st.sampled_from([0.0, 0.01, 1.0, 4.0, 30.0]),
    size=st.sampled_from([1, 7, 900, 30_000]),
    top_k=st.sampled_from([0, 1, 5, 40, 2_000, 50_000]),
    top_p=st.sampled_from([1e-6, 0.3, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 1.0]),
    temperature=st.sampled_from([0.3, 1.0, 5.0]),
)
def test_the_filters_keep_the_same_tokens_with_the_same_weights(seed, scale, size, top_k, top_p, min_p, temperature):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(size, generator=generator).mul(scale)
    if seed % 3 == 0:
        logits = logits.round()  # many equals
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    ours, theirs = filtered(logits, params)
    # Sums in float32 are rounded differently: a token may come or go at the edge of top_p, or improbable ones.
    common = (ours > 0) & (theirs > 0)
    edge = (ours > 0) != (theirs > 0)
    assert edge.sum() <= 1 or (ours + theirs)[edge].sum() <= 1e-4
    if edge.any():
        assert top_p < 1
        assert (ours + theirs)[edge].max() <= ours[common].min() * 1.001
    ours, theirs = ours[common] / ours[common].sum(), theirs[common] / theirs[common].sum()
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-7)


def test_few_tokens_are_sorted_where_few_are_probable(monkeypatch):
    sizes = []
    argsort = np.argsort
    monkeypatch.setattr(module.np, "argsort", lambda x, kind: sizes.append(len(x)) or argsort(x, kind=kind))
    torch.manual_seed(0)
    probs = torch.softmax(torch.randn(50_000) * 4, dim=-1).numpy()
    for params in (SamplingParams(temperature=1, top_p=0.7), SamplingParams(temperature=1, top_k=40, top_p=0.9)):
        candidates(probs, params)
    assert max(sizes) < 4_000


def test_every_uniform_number_has_the_token_whose_share_it_is_in():
    probs = np.array([0.0, 0.5, 0.0, 0.25, 0.25, 0.0], dtype=np.float32)
    params = SamplingParams(temperature=1)
    found = [draw(probs, params, uniform) for uniform in (0.0, 0.49, 0.5, 0.74, 0.75, 0.999999)]
    assert found == [1, 1, 3, 3, 4, 4]


@pytest.mark.parametrize("params", [SamplingParams(temperature=1), SamplingParams(temperature=1, top_p=0.9, top_k=3)])
def test_a_distribution_that_is_not_finite_has_some_token(params):
    assert 0 <= draw(np.full(9, np.nan, dtype=np.float32), params, 0.5) < 9
