"""Attention of this step's queries over the cache, and the batch layout that says which keys each query sees.

Legend: T tokens of the step, B sequences, H heads, K kv heads, G = H / K, d head dim, S keys.

A `Batch` is laid out once per step; each layer then does no more than one SDPA call per `Span` and place of its keys.
The cost follows the used length: keys are a view of the cache where slots are neighbours, a gather where not; a prefix
that sequences share is read once for all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from llama_tp.model.half import lacks_kernels, widen
from llama_tp.model.kv_cache import LayerCache, Pages, Place, Run


@dataclass(frozen=True, slots=True)
class Span:
    """The queries of one sequence, or one query each of several sequences: one SDPA call if the keys lie together."""

    rows: slice
    """The step's tokens that these queries belong to."""
    keys: Run | Pages
    """Where the keys are: read in place, or gathered."""
    shared: tuple[Run, ...] = ()
    """More keys, which every one of the queries sees: of one query each, on a CPU."""
    mask: Tensor | None = None
    """Additive, broadcastable to the scores with `keys`; None: every query sees every key."""
    causal: bool = False
    """Query i sees keys 0 .. i: a prompt from its beginning."""
    aligned: bool = False
    """Give every kv head a multiple of _ALIGNED queries, so that it does not matter which thread computes it."""


_ALIGNED = 16
"""SDPA's scratch memory of a thread lies behind that of the thread before it, and has a size in proportion to the
queries: with 3 of them it is aligned otherwise than its neighbour's, and BLAS adds up in another order."""


_WIDE = 1 << 23
"""Elements of keys and values that become float32 at a time, if they are those of more than one head."""


@dataclass(frozen=True, slots=True)
class Batch:
    """What one forward pass computes: a flat list of tokens and where their keys and values live."""

    tokens: Tensor
    """(T,) ids."""
    rope: Tensor
    """(T, 1, d / 2) rotations of the tokens' positions."""
    places: tuple[Place, ...]
    """Where the cache keeps the T tokens, in order."""
    spans: tuple[Span, ...]
    """Cover the T tokens in order."""
    rows: Tensor
    """(T,) the row of each token's sequence."""
    poisoned: Tensor
    """(rows,) how many tokens of each row's sequence had a hidden state that was not finite. Updated in place."""
    sampled: Tensor
    """Rows whose logits are wanted; may be empty."""


def attention(q: Tensor, cache: LayerCache, spans: tuple[Span, ...]) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for queries (T, H, d); grouped-query where the cache has fewer heads. (T, H, d)"""
    if len(spans) == 1:
        return _attend(q, cache, spans[0])
    out = torch.empty_like(q)
    for span in spans:
        out[span.rows] = _attend(q[span.rows], cache, span)
    return out


def _attend(q: Tensor, cache: LayerCache, span: Span) -> Tensor:
    k, v = cache.read(span.keys)  # (B, K, S, d)
    b, num_kv_heads, _, d = k.shape
    if q.size(0) == b:
        # One query each: the G heads that share a kv head become G queries of it, so no key is read twice.
        groups = q.view(b, num_kv_heads, -1, d)  # (B, K, G, d)
        if span.aligned:
            size = groups.size(2)
            groups = F.pad(groups, (0, 0, 0, -size % _ALIGNED))
            return F.scaled_dot_product_attention(groups, k, v, attn_mask=span.mask)[:, :, :size].reshape(q.shape)
        if span.shared:
            return _attend_parts(groups, k, v, cache, span).reshape(q.shape)
        if groups.size(2) == 1 and lacks_kernels(q):
            return _attend_wide(groups, k, v, span.mask)[0].to(q.dtype).reshape(q.shape)
        return F.scaled_dot_product_attention(groups, k, v, attn_mask=span.mask).reshape(q.shape)
    if span.mask is not None and q.is_cuda:
        return _attend_masked_chunk(q, k, v, span.mask)
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1).unsqueeze(0), k, v, attn_mask=span.mask, is_causal=span.causal, enable_gqa=True
    )
    return out.squeeze(0).transpose(0, 1)


def _attend_masked_chunk(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """One sequence's queries (T, H, d) over keys (1, K, S, d) under a mask (T, S).

    With a mask and enable_gqa, CUDA has no kernel but the one that writes out all scores in float32. Seen as K
    sequences of G heads that read the same keys, the memory-efficient kernel computes them in place.
    """
    num_kv_heads = k.size(1)
    groups = q.unflatten(1, (num_kv_heads, -1)).permute(1, 2, 0, 3)  # (K, G, T, d)
    k, v = (part.transpose(0, 1).expand(-1, groups.size(1), -1, -1) for part in (k, v))
    out = F.scaled_dot_product_attention(groups, k, v, attn_mask=mask)
    return out.permute(2, 0, 1, 3).flatten(1, 2)


def _attend_parts(q: Tensor, k: Tensor, v: Tensor, cache: LayerCache, span: Span) -> Tensor:
    """Queries (B, K, G, d) over their own keys (B, K, S, d) and the shared ones, which all B read as one sequence.

    Softmax over several places is the mean of their softmaxes, weighted by their sums of exponentials (Hydragen,
    arXiv:2402.05099).
    """
    b, _, size, _ = q.shape
    out, lse = _attend_part(q, k, v, span.mask)
    out = out.float()
    together = q.transpose(0, 1).flatten(1, 2).unsqueeze(0)  # (1, K, B * G, d)
    for run in span.shared:
        part, part_lse = _attend_part(together, *cache.read(run))
        part, part_lse = (one[0].unflatten(1, (b, size)).transpose(0, 1) for one in (part, part_lse))
        out = torch.lerp(out, part.float(), torch.sigmoid(part_lse - lse).unsqueeze(-1))
        lse = torch.logaddexp(lse, part_lse)
    return out.to(q.dtype)


def _attend_part(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """SDPA for queries (B, K, G, d), and the logarithms of its sums of exponentials, (B, K, G)."""
    return _attend_wide(q, k, v, mask) if lacks_kernels(q) else _flash(q, k, v, attn_mask=mask)


_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
"""What SDPA calls on CPUs; it also returns the logarithms."""


def _attend_wide(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same from half precision to float32, on a CPU without instructions for it: SDPA would take the numbers one at
    a time, for one query of a kv head 2 to 3 times as long. A few heads at a time become float32."""
    out = torch.empty_like(q, dtype=torch.float32)
    lse = out.new_empty(q.shape[:3])
    mask = None if mask is None else mask.float()
    step = max(1, _WIDE // (2 * k[:, 0].numel()))
    for head in range(0, q.size(1), step):
        heads = slice(head, head + step)
        wide_k, wide_v = widen(k[:, heads], v[:, heads])
        out[:, heads], lse[:, heads] = _flash(q[:, heads].float(), wide_k, wide_v, attn_mask=mask)
    return out, lse
