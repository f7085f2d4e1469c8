"""Where stored tensors are cut, so that ranks at every tensor-parallel size read only their own bytes, once."""

from __future__ import annotations

from itertools import pairwise

from llama_tp.config import ModelArgs
from llama_tp.parallel.sharding import legal_tp_sizes, shard_length, tp_dim

MAX_CUT_TP_SIZE = 16
"""At larger TP sizes, ranks share chunks."""


def chunk_bounds(args: ModelArgs, name: str, shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """(start, length) of a tensor's chunks along `tp_dim`, ascending: one chunk for a replicated tensor.

    The cuts are exactly those of every rank at every legal TP size up to MAX_CUT_TP_SIZE. So each rank's slice is a
    union of whole chunks, even if the vocabulary is not divisible.
    """
    dim = tp_dim(name)
    length = shape[dim or 0]
    cuts = {0, length}
    if dim is not None:
        for size in legal_tp_sizes(args):
            if size <= MAX_CUT_TP_SIZE:
                cuts |= set(range(0, length, shard_length(args, name, length, size)))
    edges = sorted(cuts)
    return [(start, end - start) for start, end in pairwise(edges)]
