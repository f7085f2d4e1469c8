"""Attention in the forms that a device needs, against the plain call."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from llama_tp.model.attention.planner import AttentionCall, SdpaCosts
from llama_tp.model.attention.sdpa import SdpaStep, attend_masked_chunk
from llama_tp.model.kv_cache import KVCache, SlotRange


@pytest.mark.parametrize("num_kv_heads", [1, 2, 6])
def test_a_masked_chunk_seen_as_one_sequence_a_kv_head_is_grouped_query_attention(num_kv_heads):
    """The form for GPUs, which have no fast kernel for both a mask and grouped queries."""
    torch.manual_seed(0)
    q = torch.randn(5, 6, 16)
    k, v = torch.randn(2, 1, num_kv_heads, 9, 16)
    mask = torch.zeros(5, 9).masked_fill_(torch.ones(5, 9).triu(5).bool(), float("-inf"))
    expected = F.scaled_dot_product_attention(q.transpose(0, 1)[None], k, v, attn_mask=mask, enable_gqa=True)
    ours = attend_masked_chunk(q, k, v, mask)
    torch.testing.assert_close(ours, expected[0].transpose(0, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fp32_fallback", [False, True])
@pytest.mark.parametrize("is_scattered", [False, True])
@pytest.mark.parametrize("count", [1, 3])
def test_single_queries_over_half_precision_keys_attend_as_in_float64(count, is_scattered, fp32_fallback):
    """Multi-head: one query for each kv head. Heads are upcast in two parts."""
    torch.manual_seed(0)
    cache = KVCache(
        n_layers=1, num_pages=8, page_size=8, num_kv_heads=4, head_dim=16, dtype=torch.bfloat16, device="cpu"
    )
    cache._data.normal_()
    slots = torch.stack([torch.arange(16 * i, 16 * i + 13) for i in range(count)])
    pages = torch.tensor([[2 * i, 2 * i + 1] for i in range(count)])
    q = torch.randn(count, 4, 16).bfloat16()
    mask = torch.zeros(count, 1, 1, 13, dtype=torch.bfloat16)
    mask[0, ..., 9:] = float("-inf")
    (layer,) = cache.layers
    keys = cache.gathered(pages, 13) if is_scattered else SlotRange(0, 13, count=count, stride=16)
    call = AttentionCall(slice(0, count), keys, mask=mask)
    step = SdpaStep([call], (), SdpaCosts(upcast_elements=1000), fp32_fallback)
    out = step(q, q, q, layer)
    k, v = (part[slots].double().transpose(1, 2) for part in (layer.k, layer.v))
    scores = torch.einsum("bhd,bhsd->bhs", q.double(), k) / 4 + mask.squeeze(2).double()
    expected = torch.einsum("bhs,bhsd->bhd", scores.softmax(-1), v)
    torch.testing.assert_close(out.double(), expected, atol=0.02, rtol=0.02)
