"""A linear layer gives the same numbers in each of its layouts, on CPUs with and without half-precision kernels."""

from __future__ import annotations

import pytest
import torch

from llama_tp.model import attention, half, linear
from llama_tp.model.attention import Span
from llama_tp.model.kv_cache import KVCache, Run
from llama_tp.model.linear import Linear

RELATIVE = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""Half of the last place of a result: what rounding it once costs; sums are float32."""


@pytest.fixture(params=[False, True], ids=["as this CPU has it", "no half precision"])
def _kernels(request, monkeypatch):
    """Most machines have one of the two ways only."""
    if request.param:
        for module in (linear, attention):
            monkeypatch.setattr(module, "lacks_kernels", lambda tensor: tensor.dtype.itemsize == 2)
    monkeypatch.setattr(linear, "_PIECE", 700)
    monkeypatch.setattr(attention, "_WIDE", 2000)


@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize("dtype", RELATIVE, ids=str)
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 5, 16, 33])
@pytest.mark.parametrize("shape", [(100, 64), (7, 48), (3, 1000)], ids=str)
def test_every_layout_multiplies_as_float64_does(dtype, num_tokens, shape):
    """Pieces of 700 elements: many with a rest, one, and one for each row."""
    torch.manual_seed(0)
    weight = torch.randn(shape).to(dtype)
    x = torch.randn(num_tokens, shape[1]).to(dtype)
    y = Linear(weight.clone())(x)
    exact = x.double() @ weight.double().t()
    assert (y.dtype, y.is_contiguous()) == (dtype, True)
    size = (x.double().abs() @ weight.double().abs().t()) * 1e-6  # of the float32 sum's own rounding
    assert ((y.double() - exact).abs() <= RELATIVE[dtype] * exact.abs() + size).all()


def test_x_may_be_a_view():
    weight = torch.randn(50, 32).bfloat16()
    wide = torch.randn(9, 64).bfloat16()
    torch.testing.assert_close(Linear(weight)(wide[:, ::2]), Linear(weight)(wide[:, ::2].contiguous()), atol=0, rtol=0)


@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize("is_scattered", [False, True])
@pytest.mark.parametrize("count", [1, 3])
def test_single_queries_over_half_precision_keys_attend_as_in_float32(count, is_scattered):
    """Multi-head: one query for each kv head."""
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
    keys = cache.pages(pages, 13) if is_scattered else Run(0, 13, count=count, stride=16)
    out = attention.attention(q, layer, (Span(slice(0, count), keys, mask=mask),))
    k, v = (part[slots].double().transpose(1, 2) for part in (layer.k, layer.v))
    scores = torch.einsum("bhd,bhsd->bhs", q.double(), k) / 4 + mask.squeeze(2).double()
    expected = torch.einsum("bhs,bhsd->bhd", scores.softmax(-1), v)
    torch.testing.assert_close(out.double(), expected, atol=0.02, rtol=0.02)


def test_wide_copies_may_be_made_in_and_outside_of_inference_mode():
    """Steps run in it, and what they leave must be of use to whoever computes in that thread later."""
    half._of_thread.__dict__.clear()
    with torch.inference_mode():
        half.widen(torch.ones(5, dtype=torch.bfloat16))
    (copy,) = half.widen(torch.full((4,), 2.0, dtype=torch.bfloat16))
    assert copy.tolist() == [2, 2, 2, 2]


def test_wide_copies_share_memory_that_is_kept():
    one, two = half.widen(torch.ones(3, dtype=torch.bfloat16), torch.arange(4).bfloat16().view(2, 2).t())
    assert (one.tolist(), two.tolist()) == ([1, 1, 1], [[0, 2], [1, 3]])
    (three,) = half.widen(torch.zeros(2, dtype=torch.float16))
    assert three.data_ptr() == one.data_ptr()
