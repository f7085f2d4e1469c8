"""Attention in the forms that a device needs, against the plain call."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from llama_tp.model.attention import _attend_masked_chunk


@pytest.mark.parametrize("num_kv_heads", [1, 2, 6])
def test_a_masked_chunk_seen_as_one_sequence_a_kv_head_is_grouped_query_attention(num_kv_heads):
    """The form for GPUs, which have no fast kernel for both a mask and grouped queries."""
    torch.manual_seed(0)
    q = torch.randn(5, 6, 16)
    k, v = torch.randn(2, 1, num_kv_heads, 9, 16)
    mask = torch.zeros(5, 9).masked_fill_(torch.ones(5, 9).triu(5).bool(), float("-inf"))
    expected = F.scaled_dot_product_attention(q.transpose(0, 1)[None], k, v, attn_mask=mask, enable_gqa=True)
    ours = _attend_masked_chunk(q, k, v, mask)
    torch.testing.assert_close(ours, expected[0].transpose(0, 1), rtol=1e-5, atol=1e-5)
