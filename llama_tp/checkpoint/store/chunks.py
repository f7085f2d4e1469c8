"""Where a stored tensor is cut, so that every tensor-parallel size reads its own bytes once."""

from __future__ import annotations

from itertools import pairwise

from llama_tp.config import ModelArgs
from llama_tp.parallel.sharding import legal_tp_sizes, shard_length, tp_dim

MAX_CUT_TP_SIZE = 16
"""TP sizes above this share chunks between ranks."""


def chunk_bounds(args: ModelArgs, name: str, shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """(start, length) of the chunks of a tensor along `tp_dim`, ascending: one chunk for what is replicated.

    The cuts are those of every rank at every legal TP size up to MAX_CUT_TP_SIZE, and no others. So each rank's slice
    is a union of whole chunks, also where a vocabulary does not divide.
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
