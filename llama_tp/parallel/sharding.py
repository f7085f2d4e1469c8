"""The tensor-parallel sharding plan, as data, and each rank's shard of every weight, for any number of ranks.

Column-parallel weights are split on their output dim and need no communication; row-parallel ones are split on
their input dim and end in one all-reduce (Megatron-LM, arXiv:1909.08053). A bias is split like the output: with a
column-parallel weight, not with a row-parallel one; so are the scales of a quantized weight's rows. Norms are
replicated.

No size has to be divisible: query heads are split where it costs least, each with its kv head, the feed-forward is
split in steps, and the vocabulary is padded. For unequal devices, ranks may have unequal shares: of
all but the vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from typing import NamedTuple

from llama_tp.model.weights import layer_shapes, weight_shapes
from llama_tp.model_args import ModelArgs

COLUMN, ROW, VOCAB_IN, VOCAB_OUT = "column", "row", "vocabulary in", "vocabulary out"

LLAMA_TP_PLAN = {
    "tok_embeddings": VOCAB_IN,
    "layers.*.attention.wq": COLUMN,
    "layers.*.attention.wk": COLUMN,
    "layers.*.attention.wv": COLUMN,
    "layers.*.attention.wo": ROW,
    "layers.*.feed_forward.w1": COLUMN,
    "layers.*.feed_forward.w2": ROW,
    "layers.*.feed_forward.w3": COLUMN,
    "output": VOCAB_OUT,
}
"""Module pattern -> how its weight and bias are sharded. Anything else is replicated."""

NOMINAL_CONTEXT = 16384
"""Tokens in the KV cache for which the split of heads minimizes decode time: 16 sequences of 1,024."""
MAX_STEP = 32
"""Maximum difference of ranks' shares of the feed-forward, in columns."""
_STEP_TOLERANCE = 1.05
"""The busiest rank's share may exceed an even one by this factor before the step is made smaller."""


Ranks = int | tuple[int, ...]
"""The ranks of a group: how many, if their shares are equal, else the query heads of each."""


def num_ranks(ranks: Ranks) -> int:
    """How many there are."""
    return ranks if isinstance(ranks, int) else len(ranks)


def why_illegal(args: ModelArgs, ranks: Ranks) -> str | None:
    """Why a model cannot run on these ranks; None if it can."""
    if isinstance(ranks, tuple):
        return _why_illegal_shares(args, ranks)
    size = ranks
    if size < 1:
        return "must be at least 1"
    if size > args.n_heads:
        return f"exceeds n_heads={args.n_heads}: every rank needs a query head"
    return None


def _why_illegal_shares(args: ModelArgs, shares: tuple[int, ...]) -> str | None:
    if not shares or any(share < 1 for share in shares):
        return "must have at least one query head for every rank"
    if sum(shares) != args.n_heads:
        return f"adds up to {sum(shares)}, but must add up to n_heads={args.n_heads}"
    return None


def check_tp_size(args: ModelArgs, ranks: Ranks) -> None:
    """ValueError with the reason if the model cannot run on these ranks."""
    if not (reason := why_illegal(args, ranks)):
        return
    if isinstance(ranks, tuple):
        raise ValueError(f"tp_shares={list(ranks)} {reason}")
    raise ValueError(f"tensor_parallel_size={ranks} {reason}; this model runs at any size from 1 to {args.n_heads}")


def tp_dim(name: str) -> int | None:
    """The dim on which the plan splits a weight or bias; None if it is replicated."""
    sharding = _sharding(name)
    if sharding is None:
        return None
    if sharding == ROW:
        return None if name.endswith((".bias", ".row_scales")) else 1
    return 0


class Segment(NamedTuple):
    """Query heads of one rank that attend to the same kv head."""

    kv_head: int
    queries: range


Heads = tuple[Segment, ...]
"""The attention heads of one rank. It computes the same number of query heads for each of its kv heads, that of the
largest segment: the others are padded with zero heads."""


def heads(args: ModelArgs, ranks: Ranks, rank: int) -> Heads:
    """The heads of one of the ranks."""
    if isinstance(ranks, tuple):
        return _segments(_share(args.n_heads, rank, ranks), args.n_heads // args.n_kv_heads)
    return _split_heads(args.n_heads, args.n_kv_heads, args.dim, ranks)[rank]


def local_kv_heads(args: ModelArgs, ranks: Ranks, rank: int) -> int:
    """The number of kv heads on one of the ranks. Other ranks may have copies."""
    return len(heads(args, ranks, rank))


@cache
def _split_heads(n_heads: int, n_kv_heads: int, dim: int, size: int) -> tuple[Heads, ...]:
    """The split of the heads that makes a decode step cheapest on the busiest rank.

    Splitting a kv head's queries among ranks balances them better, but copies the kv head's weights and cache.
    """
    per_kv_head = n_heads // n_kv_heads
    # Split each kv head's queries into units, and the units into equal shares; or give each kv head its own ranks.
    splits = [
        [_flatten([units[unit] for unit in _share(len(units), rank, size)]) for rank in range(size)]
        for num_parts in range(1, per_kv_head + 1)
        if len(units := _units([num_parts] * n_kv_heads, per_kv_head)) >= size
    ]
    if size >= n_kv_heads:
        splits.append(_units([len(_share(size, kv_head, n_kv_heads)) for kv_head in range(n_kv_heads)], per_kv_head))

    def cost(split: list[range]) -> int:
        # Elements that a step reads: wq, wo, wk and wv, then keys and values; all of it divided by 2 head_dim.
        num_heads = [(len(of_rank), _group(of_rank)) for of_rank in (_segments(one, per_kv_head) for one in split)]
        return max(kv_heads * (dim * (group + 1) + NOMINAL_CONTEXT) for kv_heads, group in num_heads)

    possible = [split for split in splits if all(split)]
    return tuple(_segments(queries, per_kv_head) for queries in min(possible, key=cost))


def _units(num_parts: list[int], per_kv_head: int) -> list[range]:
    """The query heads of each kv head, in the given number of parts."""
    return [
        _shifted(_share(per_kv_head, part, parts), kv_head * per_kv_head)
        for kv_head, parts in enumerate(num_parts)
        for part in range(parts)
    ]


def _segments(queries: range, per_kv_head: int) -> Heads:
    """Query heads, grouped by kv head."""
    first, last = queries[0] // per_kv_head, queries[-1] // per_kv_head
    every = (range(kv_head * per_kv_head, (kv_head + 1) * per_kv_head) for kv_head in range(first, last + 1))
    return tuple(
        Segment(one.start // per_kv_head, range(max(queries.start, one.start), min(queries.stop, one.stop)))
        for one in every
    )


def _group(of_rank: Heads) -> int:
    """Query heads that a rank computes per kv head."""
    return max(len(segment.queries) for segment in of_rank)


@dataclass(frozen=True, slots=True)
class Shard:
    """A rank's part of a weight, along its `tp_dim`."""

    parts: tuple[tuple[int, range], ...]
    """(position in the padded shard, entries of the weight), ascending. The rest of the padded shard is zeros."""
    kept: tuple[range, ...]
    """The positions that the rank computes with; the others only give all padded shards the same size."""

    @property
    def length(self) -> int:
        """Entries that the rank computes with."""
        return sum(map(len, self.kept))

    def divided(self, by: int) -> Shard:
        """The shard of a tensor that has one entry for each `by` entries of this one's."""
        if by == 1:
            return self
        parts = tuple((position // by, _divided(entries, by)) for position, entries in self.parts)
        return Shard(parts, tuple(_divided(one, by) for one in self.kept))

    @property
    def compact(self) -> Shard:
        """The same shard without the entries that the rank does not compute with."""
        starts = [sum(map(len, self.kept[:index])) for index in range(len(self.kept))]
        moved = zip(self.parts, self.kept, starts, strict=True)
        parts = tuple((start + position - kept.start, entries) for (position, entries), kept, start in moved)
        return Shard(parts, (range(self.length),))


def shard(args: ModelArgs, name: str, ranks: Ranks, rank: int, length: int | None = None) -> Shard:
    """A rank's shard of a weight or bias that the plan splits. A vocabulary's may be empty.

    length: entries of the tensor along its `tp_dim`, if fewer than those of the weight: packed columns of a quantized
    one, or its groups of columns.
    """
    whole = _shard(args, name, ranks, rank)
    return whole if length is None else whole.divided(_full_length(args, name) // length)


def _full_length(args: ModelArgs, name: str) -> int:
    """Entries of a dense weight along its `tp_dim`."""
    if _sharding(name) in (VOCAB_IN, VOCAB_OUT):
        return args.vocab_size
    if ".feed_forward." in name:
        return args.hidden_dim
    return args.head_dim * (args.n_kv_heads if _module(name).endswith((".wk", ".wv")) else args.n_heads)


def _shard(args: ModelArgs, name: str, ranks: Ranks, rank: int) -> Shard:
    module = _module(name)
    if _sharding(name) in (VOCAB_IN, VOCAB_OUT):
        length = vocab_shard(args, ranks)
        start = min(rank * length, args.vocab_size)
        return _plain(range(start, min(start + length, args.vocab_size)))
    if ".feed_forward." in module:
        step = feed_forward_step(args.hidden_dim, ranks, args.quantization_group)
        return _plain(_scaled(_share(args.hidden_dim // step, rank, ranks), step))
    local, width = heads(args, ranks, rank), args.head_dim
    if module.endswith((".wk", ".wv")):
        kv_heads = range(local[0].kv_head, local[-1].kv_head + 1)
        return _plain(_scaled(kv_heads, width))
    stride = width * max(_group(heads(args, ranks, other)) for other in range(num_ranks(ranks)))
    parts = tuple((index * stride, _scaled(segment.queries, width)) for index, segment in enumerate(local))
    if all(len(entries) == stride for _, entries in parts):
        return _plain(_flatten([entries for _, entries in parts]))
    return Shard(parts, tuple(range(start, start + width * _group(local)) for start, _ in parts))


def _divided(entries: range, by: int) -> range:
    assert entries.start % by == entries.stop % by == 0, "ranks divide a group of quantized weights"
    return range(entries.start // by, entries.stop // by)


def padded_length(args: ModelArgs, name: str, ranks: Ranks) -> int:
    """Entries of a weight's padded shard, the same on all ranks."""
    return max(shard(args, name, ranks, rank).kept[-1].stop for rank in range(num_ranks(ranks)))


def _plain(entries: range) -> Shard:
    return Shard(((0, entries),), (range(len(entries)),))


@cache
def feed_forward_step(hidden_dim: int, ranks: Ranks, group: int = 1) -> int:
    """The columns in which the feed-forward is split: a power of two. group: columns that are never divided."""
    shares = (1,) * ranks if isinstance(ranks, int) else ranks
    exact = [hidden_dim * share / sum(shares) for share in shares]

    def costs_little(step: int) -> bool:
        lengths = (step * len(_share(hidden_dim // step, rank, shares)) for rank in range(len(shares)))
        return all(length <= _STEP_TOLERANCE * wanted for length, wanted in zip(lengths, exact, strict=True))

    step = math.gcd(hidden_dim, MAX_STEP)
    while step > group and not costs_little(step):
        step //= 2
    return step


def vocab_shard(args: ModelArgs, ranks: Ranks) -> int:
    """Rows of the embedding and of the output on every rank, padding included: equal shares on any ranks."""
    return -(-args.vocab_size // num_ranks(ranks))


def local_shape(args: ModelArgs, name: str, shape: tuple[int, ...], ranks: Ranks, rank: int) -> tuple[int, ...]:
    """Shape of a parameter of this `shape` as a rank computes with it: vocabularies are padded to the same size on all
    ranks."""
    split = tp_dim(name)
    if split is None:
        return shape
    if _sharding(name) in (VOCAB_IN, VOCAB_OUT):
        length = vocab_shard(args, ranks)
    else:
        length = shard(args, name, ranks, rank, shape[split]).length
    return tuple(length if dim == split else full for dim, full in enumerate(shape))


def local_shapes(args: ModelArgs, ranks: Ranks, rank: int) -> dict[str, tuple[int, ...]]:
    """Shapes of all weights as one rank computes with them."""
    return {name: local_shape(args, name, shape, ranks, rank) for name, shape in weight_shapes(args).items()}


def num_parameters_of_rank(args: ModelArgs, ranks: Ranks, rank: int) -> int:
    """Parameters on a rank, including replicated norms, copies of kv heads and the padded vocabulary."""
    layer, other = layer_shapes(args)

    def count(shapes: dict[str, tuple[int, ...]]) -> int:
        return sum(math.prod(local_shape(args, name, shape, ranks, rank)) for name, shape in shapes.items())

    return args.n_layers * count(layer) + count(other)


def _share(count: int, rank: int, ranks: Ranks) -> range:
    """A rank's share of `count` items; equal shares differ by at most one. Cuts at equal fractions are the same for all
    numbers of ranks, so that a stored tensor has few chunks."""
    if isinstance(ranks, tuple):
        total, start, stop = sum(ranks), sum(ranks[:rank]), sum(ranks[: rank + 1])
    else:
        total, start, stop = ranks, rank, rank + 1
    return range(-(-start * count // total), -(-stop * count // total))


def _scaled(items: range, width: int) -> range:
    """The entries of items of `width` entries each."""
    return range(width * items.start, width * items.stop)


def _shifted(items: range, by: int) -> range:
    return range(items.start + by, items.stop + by)


def _flatten(adjacent: list[range]) -> range:
    """Adjacent ranges as one."""
    return range(adjacent[0].start, adjacent[-1].stop) if adjacent else range(0)


def _sharding(name: str) -> str | None:
    module = _module(name)
    return next((sharding for pattern, sharding in LLAMA_TP_PLAN.items() if fnmatchcase(module, pattern)), None)


def _module(name: str) -> str:
    """The module of a weight or bias."""
    return name.rpartition(".")[0]
