"""Draws from one distribution on a CPU, without sorting the vocabulary.

top_k and top_p keep few of some 100,000 tokens. All that are kept are among the tokens of at least some probability, if
these are many enough, or probable enough together; only they are sorted.

Legend: V vocabulary, C candidates.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llama_tp.engine.sampling_params import SamplingParams

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]

_FLOORS = (2.0**-10, 2.0**-14, 2.0**-18)
"""Probabilities of at least that: at most 1,024 tokens have the first one, and usually some dozens."""
_MARGIN = 1e-5
"""Of sums in float32."""


def draw(probs: Floats, params: SamplingParams, uniform: float) -> int:
    """A token id from the distribution (V,), filtered by top_k, top_p and min_p. `uniform`: from [0, 1). Arbitrary if
    the distribution is not finite."""
    ids, kept = candidates(probs, params)
    sums = np.cumsum(kept, dtype=np.float64)
    at = int(np.searchsorted(sums, uniform * sums[-1], side="right"))  # never a token of probability zero
    return int(ids[min(at, len(ids) - 1)])


def candidates(probs: Floats, params: SamplingParams) -> tuple[Ids, Floats]:
    """What the filters leave: ids (C,) and probabilities (C,), which need not add up to 1. The same tokens as in
    `llama_tp.engine.sampler.probabilities`."""
    top_k, top_p = params.top_k, params.top_p
    if not top_k and top_p >= 1:
        ids, kept = np.arange(len(probs)), probs
    else:
        ids = _most_probable(probs, top_k, top_p)
        kept = probs[ids]
        if top_k:
            ids, kept = ids[:top_k], kept[:top_k]
        if top_p < 1:
            before = np.cumsum(kept, dtype=np.float64) - kept  # total probability of more likely tokens
            is_tail = before >= top_p * kept.sum() if top_k else before >= top_p
            is_tail[0] = False
            ids, kept = ids[~is_tail], kept[~is_tail]
    if params.min_p:
        kept = np.where(kept < kept.max() * np.float32(params.min_p), np.float32(0), kept)
    return ids, kept


def _most_probable(probs: Floats, top_k: int, top_p: float) -> Ids:
    """The ids that both filters keep, and perhaps more, by falling probability; equals by rising id."""
    for floor in _FLOORS:
        ids = np.flatnonzero(probs >= floor)
        kept = probs[ids]
        is_enough = len(ids) >= top_k if top_k else float(kept.sum(dtype=np.float64)) >= top_p + _MARGIN
        if is_enough:
            return ids[np.argsort(-kept, kind="stable")]
    if top_k and top_k < len(probs):
        # With all equals of the last one; all tokens if nothing is finite.
        ids = np.flatnonzero(~(probs < np.partition(probs, -top_k)[-top_k]))
        return ids[np.argsort(-probs[ids], kind="stable")]
    return np.argsort(-probs, kind="stable")
