"""Where stored tensors are cut, so that ranks at every tensor-parallel size read only their own bytes, once."""

from __future__ import annotations

from itertools import pairwise

from llama_tp.model_args import ModelArgs
from llama_tp.parallel.sharding import shard, tp_dim

DEFAULT_TP_MAX = 8
"""One host's GPUs."""


def chunk_bounds(args: ModelArgs, name: str, shape: tuple[int, ...], tp_max: int) -> list[tuple[int, int]]:
    """(start, length) of a tensor's chunks along `tp_dim`, ascending: one chunk for a replicated tensor.

    The cuts are exactly those of every rank at every TP size up to `tp_max`, so each rank's shard is a union of whole
    chunks. In larger groups, ranks read slightly more than their shard.
    """
    dim = tp_dim(name)
    length = shape[dim or 0]
    edges = {0, length}
    if dim is not None:
        for size in range(1, min(tp_max, args.n_heads) + 1):
            for rank in range(size):
                parts = shard(args, name, size, rank, length).parts
                edges |= {edge for _, entries in parts for edge in (entries.start, entries.stop)}
    return [(start, end - start) for start, end in pairwise(sorted(edges))]
