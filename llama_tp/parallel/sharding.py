"""The tensor-parallel sharding plan, as data, the sizes it is legal for, and what one rank holds.

Column-parallel weights are split on their output dim and need no communication; row-parallel ones are split on
their input dim and end in one all-reduce (Megatron-LM, arXiv:1909.08053). A bias is split as the output is: with a
column-parallel weight, not with a row-parallel one. Norms are replicated.
"""

from __future__ import annotations

import math
from fnmatch import fnmatchcase

from llama_tp.config import ModelArgs
from llama_tp.model.weights import weight_shapes

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
"""Module pattern -> how its weight and bias are sharded. What is not named is replicated."""


def why_illegal(args: ModelArgs, size: int) -> str | None:
    """The reason why a model cannot run at this tensor-parallel size; None if it can."""
    if size < 1:
        return "must be at least 1"
    if args.n_heads % size:
        return f"does not divide n_heads={args.n_heads}"
    if args.n_kv_heads % size and size % args.n_kv_heads:
        return f"neither divides n_kv_heads={args.n_kv_heads} nor is a multiple of it"
    if args.hidden_dim % size:
        return f"does not divide the feed-forward hidden size {args.hidden_dim}"
    return None


def legal_tp_sizes(args: ModelArgs) -> list[int]:
    """Every tensor-parallel size that this model can run at, ascending."""
    return [size for size in range(1, args.n_heads + 1) if why_illegal(args, size) is None]


def check_tp_size(args: ModelArgs, size: int) -> None:
    """ValueError with the reason and the legal sizes if the model cannot run at this size."""
    if reason := why_illegal(args, size):
        legal = ", ".join(map(str, legal_tp_sizes(args)))
        raise ValueError(f"tensor_parallel_size={size} {reason}; legal sizes for this model: {legal}")


def tp_dim(name: str) -> int | None:
    """The dim of a weight or bias that the plan splits; None for what it replicates."""
    sharding = _sharding(name)
    if sharding is None:
        return None
    if sharding == ROW:
        return None if name.endswith(".bias") else 1
    return 0


def shard_length(args: ModelArgs, name: str, length: int, size: int) -> int:
    """Entries of a weight's `tp_dim` that each rank but the last holds: torch.chunk's rule. A vocabulary need not
    divide; kv heads are replicated, never split."""
    if _module(name).endswith((".wk", ".wv")):
        size = min(size, args.n_kv_heads)
    assert _sharding(name) in (VOCAB_IN, VOCAB_OUT) or length % size == 0, (name, length, size)
    return -(-length // size)


def local_shapes(args: ModelArgs, size: int) -> dict[str, tuple[int, ...]]:
    """Every weight as one rank of `size` holds it, with the vocabulary padded so that all ranks hold the same."""
    return {
        name: tuple(
            shard_length(args, name, length, size) if dim == tp_dim(name) else length
            for dim, length in enumerate(shape)
        )
        for name, shape in weight_shapes(args).items()
    }


def num_parameters_of_rank(args: ModelArgs, size: int) -> int:
    """Parameters that one rank of `size` holds, with replicated norms and kv heads and the padded vocabulary."""
    return sum(map(math.prod, local_shapes(args, size).values()))


def local_kv_heads(args: ModelArgs, size: int) -> int:
    """The kv heads that live on one rank of `size`."""
    return max(1, args.n_kv_heads // size)


def _sharding(name: str) -> str | None:
    module = _module(name)
    return next((sharding for pattern, sharding in LLAMA_TP_PLAN.items() if fnmatchcase(module, pattern)), None)


def _module(name: str) -> str:
    """Of a weight or a bias."""
    return name.rpartition(".")[0]
