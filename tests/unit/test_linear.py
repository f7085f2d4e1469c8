"""A linear layer gives the same numbers in each of its layouts, on CPUs with and without half-precision kernels."""

from __future__ import annotations

import pytest
import torch

from llama_tp.model import fp32_fallback, linear
from llama_tp.model.linear import DenseLinear
from llama_tp.model.weights import DENSE

RELATIVE = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""Half of the last place of a result: what rounding it once costs; sums are float32."""


@pytest.fixture(params=[False, True], ids=["as this CPU has it", "no half precision"])
def _kernels(request, monkeypatch):
    """Most machines have one of the two ways only."""
    if request.param:
        monkeypatch.setattr(linear, "needs_fp32", lambda _device, dtype: dtype.itemsize == 2)
    monkeypatch.setattr(linear, "_PIECE", 700)


@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize("dtype", RELATIVE, ids=str)
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 5, 16, 33])
@pytest.mark.parametrize("shape", [(100, 64), (7, 48), (3, 1000)], ids=str)
def test_every_layout_multiplies_as_float64_does(dtype, num_tokens, shape):
    """Pieces of 700 elements: many with a rest, one, and one for each row."""
    torch.manual_seed(0)
    weight = torch.randn(shape).to(dtype)
    x = torch.randn(num_tokens, shape[1]).to(dtype)
    y = DenseLinear(weight.clone())(x)
    exact = x.double() @ weight.double().t()
    assert (y.dtype, y.is_contiguous()) == (dtype, True)
    size = (x.double().abs() @ weight.double().abs().t()) * 1e-6  # of the float32 sum's own rounding
    assert ((y.double() - exact).abs() <= RELATIVE[dtype] * exact.abs() + size).all()


@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize("dtype", RELATIVE, ids=str)
@pytest.mark.parametrize("num_tokens", [1, 2, 5, 33])
def test_every_layout_adds_a_bias(dtype, num_tokens):
    torch.manual_seed(0)
    weight, bias, x = (torch.randn(shape).to(dtype) for shape in ((100, 64), (100,), (num_tokens, 64)))
    linear = DenseLinear(weight.clone(), bias)
    exact = x.double() @ weight.double().t() + bias.double()
    # Some kernels round the product before they add: half of the last place of a number of up to |product| + |bias|.
    size = x.double().abs() @ weight.double().abs().t() + bias.double().abs()
    assert ((linear(x).double() - exact).abs() <= RELATIVE[dtype] * (exact.abs() + size)).all()
    assert torch.equal(linear.dense_weight(), weight)
    assert linear.num_bytes == weight.nbytes + bias.nbytes


def test_x_may_be_a_view():
    weight = torch.randn(50, 32).bfloat16()
    wide = torch.randn(9, 64).bfloat16()
    linear = DenseLinear(weight)
    torch.testing.assert_close(linear(wide[:, ::2]), linear(wide[:, ::2].contiguous()), atol=0, rtol=0)


@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize("dtype", RELATIVE, ids=str)
def test_every_layout_gives_its_weight_back(dtype):
    weight = torch.randn(50, 32).to(dtype)
    linear = DenseLinear(weight.clone())
    assert torch.equal(linear.dense_weight(), weight)
    assert linear.num_bytes == weight.nbytes


def test_upcast_copies_may_be_made_in_and_outside_of_inference_mode():
    """Steps run in it, and what they leave must be of use to whoever computes in that thread later."""
    fp32_fallback._of_thread.__dict__.clear()
    with torch.inference_mode():
        fp32_fallback.upcast(torch.ones(5, dtype=torch.bfloat16))
    (copy,) = fp32_fallback.upcast(torch.full((4,), 2.0, dtype=torch.bfloat16))
    assert copy.tolist() == [2, 2, 2, 2]


def test_upcast_copies_share_memory_that_is_kept():
    one, two = fp32_fallback.upcast(torch.ones(3, dtype=torch.bfloat16), torch.arange(4).bfloat16().view(2, 2).t())
    assert (one.tolist(), two.tolist()) == ([1, 1, 1], [[0, 2], [1, 3]])
    (three,) = fp32_fallback.upcast(torch.zeros(2, dtype=torch.float16))
    assert three.data_ptr() == one.data_ptr()


def test_neighbouring_shards_are_joined_without_a_copy():
    memory = torch.arange(24.0).view(6, 4)
    joined = DENSE.linear([{"weight": memory[:1]}, {"weight": memory[1:4]}, {"weight": memory[4:]}], torch.float16)
    assert torch.equal(joined.dense_weight(), memory)
    whole = memory.half()
    kept = DENSE.linear([{"weight": whole[:2]}, {"weight": whole[2:]}], torch.float16)
    assert kept.dense_weight().data_ptr() == whole.data_ptr()
    for shards in ([whole[:2], whole[3:]], [whole[2:], whole[:2]], [whole[:, :2], whole[:, 2:]]):
        copied = DENSE.linear([{"weight": one} for one in shards], torch.float16)
        assert torch.equal(copied.dense_weight(), torch.cat(shards))
