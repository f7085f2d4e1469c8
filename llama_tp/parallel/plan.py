"""The tensor-parallel sharding plan, as data, and the sizes it is legal for.

Column-parallel weights are split on their output dim and need no communication; row-parallel ones are split on
their input dim and end in one all-reduce (Megatron-LM, arXiv:1909.08053). Norms are replicated.
"""

from __future__ import annotations

from llama_tp.config import ModelArgs

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
"""Module pattern -> how its weight is sharded. What is not named is replicated."""


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


def num_parameters_of_rank(args: ModelArgs, size: int) -> int:
    """Weights that one rank of `size` holds: its shares, the replicated norms and kv heads, the padded vocabulary."""
    kv_heads = max(1, args.n_kv_heads // size)
    attention = args.dim * args.head_dim * (2 * args.n_heads // size + 2 * kv_heads)
    block = attention + 3 * args.dim * args.hidden_dim // size + 2 * args.dim
    vocabularies = 1 if args.tied_embeddings else 2
    return args.n_layers * block + args.dim + vocabularies * -(-args.vocab_size // size) * args.dim
