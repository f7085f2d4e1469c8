"""Attention of this step's queries over the cache, and the batch layout that says which keys each query sees.

Legend: T tokens of the step, B sequences, H heads, K kv heads, G = H / K, d head dim, S keys.

A `Batch` is laid out once per step; each layer then does no more than one SDPA call per `Span`. The cost follows
the used length: keys are a slice of the cache where a sequence's slots are consecutive, a gather where not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from llama_tp.model.kv_cache import LayerCache


@dataclass(frozen=True, slots=True)
class Span:
    """One SDPA call: the queries of one sequence, or one query each of several sequences."""

    rows: slice
    """The step's tokens that these queries belong to."""
    keys: slice | Tensor
    """Slots of the keys: a run, or indices (S,), or (B, S) for B sequences of one query each."""
    mask: Tensor | None = None
    """Additive, broadcastable to the scores; None: every query sees every key."""
    causal: bool = False
    """Query i sees keys 0 .. i: a prompt from its beginning."""


@dataclass(frozen=True, slots=True)
class Batch:
    """What one forward pass computes: a flat list of tokens and where their keys and values live."""

    tokens: Tensor
    """(T,) ids."""
    rope: Tensor
    """(T, 1, d / 2) rotations of the tokens' positions."""
    slots: Tensor
    """(T,) where the cache keeps these tokens."""
    spans: tuple[Span, ...]
    """Cover the T tokens in order."""
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
    if isinstance(span.keys, slice):
        k, v = cache.k[span.keys], cache.v[span.keys]  # (S, K, d)
    elif span.keys.dim() == 1:
        k, v = cache.k.index_select(0, span.keys), cache.v.index_select(0, span.keys)
    else:
        return _attend_one_query_each(q, cache, span.keys, span.mask)
    num_kv_heads = k.size(1)
    k, v = k.transpose(0, 1).unsqueeze(0), v.transpose(0, 1).unsqueeze(0)  # (1, K, S, d)
    if q.size(0) == 1:
        # One query: the G heads that share a kv head become G queries of it, so no key is read twice.
        groups = q.view(1, num_kv_heads, -1, q.size(-1))  # (1, K, G, d)
        return F.scaled_dot_product_attention(groups, k, v).reshape(q.shape)
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1).unsqueeze(0), k, v, attn_mask=span.mask, is_causal=span.causal, enable_gqa=True
    )
    return out.squeeze(0).transpose(0, 1)


def _attend_one_query_each(q: Tensor, cache: LayerCache, keys: Tensor, mask: Tensor | None) -> Tensor:
    """B sequences with one query each, q (B, H, d), keys (B, S) padded with any slot that the mask hides."""
    b, s = keys.shape
    flat = keys.flatten()
    k = cache.k.index_select(0, flat).view(b, s, -1, q.size(-1)).transpose(1, 2)  # (B, K, S, d)
    v = cache.v.index_select(0, flat).view(b, s, -1, q.size(-1)).transpose(1, 2)
    groups = q.view(b, k.size(1), -1, q.size(-1))  # (B, K, G, d)
    return F.scaled_dot_product_attention(groups, k, v, attn_mask=mask).reshape(q.shape)
