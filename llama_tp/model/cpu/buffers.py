"""How much memory the compiled kernels allocate for a model, which is reserved before they are compiled."""

from __future__ import annotations

MAX_TOKENS = {"bfloat16": 64, "float32": 32}
"""Tokens of a step that the kernels compute as a whole, by dtype. Of a longer one they compute what is not a matrix
product: then PyTorch's, although they must first bring the weights into another order, are faster (measured)."""
KEYS_PER_PART = 512
"""Of attention, whose parts are merged: kPart in attention.h."""
_VECTOR = 16
"""Numbers of the widest vectors, those of AVX-512."""
_LINE = 64
"""Bytes of a cache line."""
_BATCH_ROWS = 48
"""Rows that a product of many tokens packs."""
_BATCH_BLOCK = 64
"""Columns of them that share a scale."""
_BLOCK = 16
"""Tokens of a prompt that attend together."""
_QUERIES = 4
"""That attend together in float32."""
_MAX_PHASES = 2048
"""Of a run: kMaxPhases in team.h."""


def buffer_bytes(
    *,
    dim: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: str,
    max_seq_len: int,
    num_threads: int,
) -> int:
    """Bytes of the buffers of one rank, all of them allocated when its kernels take over. On CPUs without AVX-512 they
    are a little smaller.

    hidden, heads, kv_heads: this rank's. dtype: of activations and cache.
    """
    tokens = MAX_TOKENS[dtype]
    parts = -(-max_seq_len // KEYS_PER_PART)
    head = _round_up(head_dim, 2 * _VECTOR)
    floats = tokens * ((heads + 2 * kv_heads) * head_dim + 2 * hidden)  # queries, keys, values; gate, up
    floats += tokens * heads * parts * (head + 2)  # of each part of the keys: sums, their total and maximum
    widest = max(dim, hidden, heads * head_dim)
    is_bfloat16 = dtype == "bfloat16"
    thread = _bytes_per_thread(widest, heads // kv_heads, head_dim, tokens, parts, is_bfloat16=is_bfloat16)
    return 4 * floats + num_threads * thread + _LINE * _MAX_PHASES


def _bytes_per_thread(widest: int, group: int, head_dim: int, tokens: int, parts: int, *, is_bfloat16: bool) -> int:
    head, scores = _round_up(head_dim, 2 * _VECTOR), KEYS_PER_PART + 2 * _VECTOR
    stride = _round_up(widest, 8 * _VECTOR)
    floats = tokens * stride + tokens * _round_up(stride // 32, _VECTOR)  # inputs, and sums of groups of them
    floats += 2 * stride  # four rows widened to bfloat16
    floats += _round_up(widest, 64) + _QUERIES * (3 * head + scores) + parts
    size = 4 * floats + 8 * _MAX_PHASES
    if is_bfloat16:
        size += (2 * _BATCH_ROWS + 2 + _VECTOR) * widest  # packed rows; a widened one, and integers to be packed
        size += 4 * _BATCH_ROWS * -(-widest // _BATCH_BLOCK)
    if is_bfloat16 and head_dim % (2 * _VECTOR) == 0:  # the attention of prompts is two matrix products
        size += 4 * KEYS_PER_PART * head_dim  # keys and values
        size += 6 * _BLOCK * scores  # scores, and weights in bfloat16
        size += 4 * _BLOCK * (group + 1) * (head_dim + 2)  # sums, totals and maxima
    return size


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step
