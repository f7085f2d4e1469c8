"""Which tensors a model has, what shapes, and where a stored tensor is cut so that every TP size reads it once."""

from __future__ import annotations

from fnmatch import fnmatchcase
from itertools import pairwise

from llama_tp.config import ModelArgs
from llama_tp.parallel.plan import LLAMA_TP_PLAN, ROW, VOCAB_IN, VOCAB_OUT, legal_tp_sizes

MAX_CUT_TP_SIZE = 16
"""TP sizes above this share chunks between ranks."""


def full_shapes(args: ModelArgs) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model by Meta's name, unsharded. `output.weight` is absent where embeddings are tied."""
    kv_dim = args.n_kv_heads * args.head_dim
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (args.vocab_size, args.dim)}
    for layer in range(args.n_layers):
        shapes |= {
            f"layers.{layer}.attention.wq.weight": (args.dim, args.dim),
            f"layers.{layer}.attention.wk.weight": (kv_dim, args.dim),
            f"layers.{layer}.attention.wv.weight": (kv_dim, args.dim),
            f"layers.{layer}.attention.wo.weight": (args.dim, args.dim),
            f"layers.{layer}.feed_forward.w1.weight": (args.hidden_dim, args.dim),
            f"layers.{layer}.feed_forward.w2.weight": (args.dim, args.hidden_dim),
            f"layers.{layer}.feed_forward.w3.weight": (args.hidden_dim, args.dim),
            f"layers.{layer}.attention_norm.weight": (args.dim,),
            f"layers.{layer}.ffn_norm.weight": (args.dim,),
        }
    shapes["norm.weight"] = (args.dim,)
    if not args.tied_embeddings:
        shapes["output.weight"] = (args.vocab_size, args.dim)
    return shapes


def tp_dim(name: str) -> int | None:
    """The dim that tensor parallelism splits; None for what it replicates."""
    sharding = _sharding(name)
    if sharding is None:
        return None
    return 1 if sharding == ROW else 0


def chunk_bounds(args: ModelArgs, name: str, shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """(start, length) of the chunks of a tensor along `tp_dim`, ascending: one chunk for what is replicated.

    The cuts are those of every rank at every legal TP size up to MAX_CUT_TP_SIZE, and no others. So each rank's slice
    is a union of whole chunks, also where a vocabulary does not divide.
    """
    dim = tp_dim(name)
    size = shape[dim or 0]
    cuts = {0, size}
    if dim is not None:
        for ranks in legal_tp_sizes(args):
            if ranks <= MAX_CUT_TP_SIZE:
                cuts |= set(range(0, size, _slice_length(args, name, size, ranks)))
    edges = sorted(cuts)
    return [(start, end - start) for start, end in pairwise(edges)]


def _slice_length(args: ModelArgs, name: str, size: int, ranks: int) -> int:
    """What each rank but the last holds of a dim: torch.chunk's rule; kv heads are replicated, never split."""
    if name.endswith((".wk.weight", ".wv.weight")):
        ranks = min(ranks, args.n_kv_heads)
    assert _sharding(name) in (VOCAB_IN, VOCAB_OUT) or size % ranks == 0, (name, size, ranks)
    return -(-size // ranks)


def _sharding(name: str) -> str | None:
    module = name.removesuffix(".weight")
    return next((sharding for pattern, sharding in LLAMA_TP_PLAN.items() if fnmatchcase(module, pattern)), None)
