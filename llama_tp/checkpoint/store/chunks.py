"""Where a stored tensor is cut, so that every tensor-parallel size reads its own bytes once."""

from __future__ import annotations

from itertools import pairwise

from llama_tp.config import ModelArgs
from llama_tp.parallel.sharding import shard, tp_dim

DEFAULT_TP_MAX = 8
"""One host's GPUs."""


def chunk_bounds(args: ModelArgs, name: str, shape: tuple[int, ...], tp_max: int) -> list[tuple[int, int]]:
    """(start, length) of the chunks of a tensor along `tp_dim`, ascending: one chunk for what is replicated.

    The cuts are those of every rank at every size up to `tp_max`, and no others. So each rank's share is a union of
    whole chunks. Ranks of larger groups read a little more than their share, at both ends.
    """
    dim = tp_dim(name)
    length = shape[dim or 0]
    edges = {0, length}
    if dim is not None:
        for size in range(1, min(tp_max, args.n_heads) + 1):
            for rank in range(size):
                edges |= {edge for _, one in shard(args, name, size, rank).parts for edge in (one.start, one.stop)}
    return [(start, end - start) for start, end in pairwise(sorted(edges))]
