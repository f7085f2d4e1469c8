"""Quantized matrices: their form, and scales that are at least as good as those of plain rounding."""

from __future__ import annotations

import re

import gguf
import pytest
import torch
from gguf.quants import dequantize as gguf_dequantize
from gguf.quants import quantize as gguf_quantize

from llama_tp.model import quantization
from llama_tp.model.quantization import (
    FORMS,
    GROUP,
    QuantizedWeight,
    dequantize,
    pack_nibbles,
    quantize,
    unpack_nibbles,
)

pytestmark = pytest.mark.usefixtures("one_thread")

GROUPED = ("int8_groups", "int4")
WEIGHTS = {
    "gaussian": lambda: torch.randn(96, 512) * 0.02,
    "heavy-tailed": lambda: torch.distributions.StudentT(3.0).sample((96, 512)) * 0.02,
    "far from zero": lambda: torch.randn(96, 512) * 0.001 + 0.5,
    "of all magnitudes": lambda: torch.randn(96, 512) * 10 ** torch.empty(96, 1).uniform_(-8, 3),
}


@pytest.fixture(params=WEIGHTS)
def weight(request):
    torch.manual_seed(0)
    return WEIGHTS[request.param]()


def same(one: QuantizedWeight, two: QuantizedWeight) -> bool:
    parts = zip(tensors(one), tensors(two), strict=True)
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in parts)


def tensors(quantized: QuantizedWeight) -> list[torch.Tensor]:
    found = [quantized.weight, quantized.scales, quantized.offsets]
    return [tensor for tensor in found if tensor is not None]


def squared_errors(quantized: QuantizedWeight, weight: torch.Tensor, size: int) -> torch.Tensor:
    """Of groups of `size` columns, in float64."""
    error = dequantize(quantized, torch.float32).double() - weight.double()
    return error.square().unflatten(1, (-1, size)).sum(-1)


def plain_rounding(weight: torch.Tensor, form: str) -> torch.Tensor:
    """The weights after plain min/max rounding with the form's stored scales, in float64."""
    if form == "int8":
        scale = (weight.abs().amax(1, keepdim=True) / 127).double()
        return (weight.double() / scale).round() * scale
    groups = weight.unflatten(1, (-1, GROUP))
    if form == "int8_groups":
        scale = (groups.abs().amax(-1, keepdim=True) / 127).half().double().clamp(min=2**-24)
        return ((groups.double() / scale).round().clamp(-127, 127) * scale).flatten(1)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale, offset = ((high - low) / 15).half().double().clamp(min=2**-24), low.half().double()
    return (((groups.double() - offset) / scale).round().clamp(0, 15) * scale + offset).flatten(1)


def test_a_quantized_matrix_has_the_tensors_of_its_form():
    weight = torch.randn(6, 64)
    shapes = {
        form: [(tuple(tensor.shape), tensor.dtype) for tensor in tensors(quantize(weight, form))] for form in FORMS
    }
    assert shapes == {
        "int8": [((6, 64), torch.int8), ((6, 1), torch.float32)],
        "int8_groups": [((6, 64), torch.int8), ((6, 2), torch.float16)],
        "int4": [((6, 32), torch.uint8), ((6, 2), torch.float16), ((6, 2), torch.float16)],
    }
    sizes = {"int8": 6 * 64 + 24, "int8_groups": 6 * (64 + 4), "int4": 6 * (32 + 8)}
    for form in FORMS:
        quantized = quantize(weight, form)
        assert (quantized.form, quantized.shape, quantized.num_bytes) == (form, (6, 64), sizes[form])


@pytest.mark.parametrize("form", FORMS)
def test_no_group_has_a_larger_error_than_after_plain_rounding(weight, form):
    size = 512 if form == "int8" else GROUP
    plain = (plain_rounding(weight, form).float().double() - weight.double()).square().unflatten(1, (-1, size)).sum(-1)
    found = squared_errors(quantize(weight, form), weight, size)
    assert (found <= plain * (1 + 1e-5) + 1e-30).all()  # errors are compared in float32


def test_nor_has_one_of_many_groups_with_outliers():
    """Where one number is 100,000 times the others, errors computed from sums are inexact."""
    torch.manual_seed(0)
    weight = torch.where(torch.rand(32, 8000) < 0.03, torch.randn(32, 8000) * 1000, torch.randn(32, 8000) * 0.01)
    plain = (plain_rounding(weight, "int4").float().double() - weight.double()).square().unflatten(1, (-1, GROUP))
    assert (squared_errors(quantize(weight, "int4"), weight, GROUP) <= plain.sum(-1) * (1 + 1e-5)).all()


@pytest.mark.parametrize("distribution", ["gaussian", "heavy-tailed"])
@pytest.mark.parametrize(("form", "theirs", "ratio"), [("int4", "Q4_1", 0.82), ("int8_groups", "Q8_0", 0.95)])
def test_the_mean_squared_error_is_below_that_of_ggufs_quantizers(distribution, form, theirs, ratio):
    torch.manual_seed(0)
    weight = WEIGHTS[distribution]()
    kind = gguf.GGMLQuantizationType[theirs]
    gguf_weight = torch.from_numpy(gguf_dequantize(gguf_quantize(weight.numpy(), kind), kind))
    ours = dequantize(quantize(weight, form), torch.float32)
    assert (ours - weight).square().mean() < ratio * (gguf_weight - weight).square().mean()


@pytest.mark.parametrize("form", FORMS)
def test_a_matrix_that_the_form_can_hold_comes_back_exactly(form):
    """Every group with its extreme levels, so that plain rounding finds its scale; levels of int4 may differ for equal
    weights."""
    torch.manual_seed(0)
    if form == "int4":
        levels = torch.randint(0, 16, (8, 128), dtype=torch.uint8)
        levels[:, ::GROUP], levels[:, 1::GROUP] = 0, 15
        scales = torch.rand(8, 4).half()
        exact = QuantizedWeight(pack_nibbles(levels), scales, -8 * scales)
    else:
        levels = torch.randint(-127, 128, (8, 128), dtype=torch.int8)
        levels[:, ::GROUP] = 127
        scales = torch.rand(8, 1) if form == "int8" else torch.rand(8, 4).half()
        exact = QuantizedWeight(levels, scales)
    weight = dequantize(exact, torch.float32)
    assert torch.allclose(dequantize(quantize(weight, form), torch.float32), weight, rtol=1e-6, atol=0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows", [(0, 1), (5, 1), (7, 33), (95, 1), (0, 96)])
def test_quantizing_rows_is_taking_rows_of_the_quantized(weight, form, rows):
    """Kernels treat the last elements of a tensor separately, so sizes are odd ones."""
    assert same(quantize(weight.narrow(0, *rows), form), quantize(weight, form).rows(*rows))


@pytest.mark.parametrize("form", GROUPED)
@pytest.mark.parametrize("columns", [(0, 32), (32, 96), (480, 32), (0, 512)])
def test_quantizing_columns_is_taking_columns_of_the_quantized(weight, form, columns):
    assert same(quantize(weight.narrow(1, *columns), form), quantize(weight, form).columns(*columns))


@pytest.mark.parametrize("form", FORMS)
def test_the_result_depends_neither_on_chunks_nor_on_threads(form, monkeypatch):
    torch.manual_seed(0)
    weight = WEIGHTS["heavy-tailed"]()
    expected, dense = quantize(weight, form), dequantize(quantize(weight, form), torch.bfloat16)
    monkeypatch.setattr(quantization, "_CHUNK", 5 * 512)
    assert same(quantize(weight, form), expected)
    assert torch.equal(dequantize(expected, torch.bfloat16), dense)
    monkeypatch.setattr(quantization, "_CHUNK", 1 << 30)
    torch.set_num_threads(2)
    try:
        assert same(quantize(weight, form), expected)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("form", FORMS)
def test_a_parameter_is_quantized_without_a_graph(weight, form):
    assert same(quantize(torch.nn.Parameter(weight.clone()), form), quantize(weight, form))


@pytest.mark.parametrize("form", FORMS)
def test_parts_of_a_quantized_matrix_are_parts_of_the_matrix(form):
    torch.manual_seed(0)
    quantized = quantize(torch.randn(12, 256), form)
    whole = dequantize(quantized, torch.float32)
    index = torch.tensor([7, 0, 11, 7])
    assert torch.equal(dequantize(quantized.rows(3, 5), torch.float32), whole[3:8])
    assert torch.equal(dequantize(quantized.columns(64, 96), torch.float32), whole[:, 64:160])
    assert torch.equal(dequantize(quantized.select_rows(index), torch.float32), whole[index])
    assert quantized.columns(64, 96).shape == (12, 96)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_weights_are_computed_in_float32_and_rounded_once(form, dtype):
    torch.manual_seed(0)
    quantized = quantize(torch.randn(5, 96), form)
    levels = (unpack_nibbles(quantized.weight) if form == "int4" else quantized.weight).double()
    per_scale = 96 // quantized.scales.size(1)
    exact = levels * quantized.scales.double().repeat_interleave(per_scale, 1)
    if quantized.offsets is not None:
        exact += quantized.offsets.double().repeat_interleave(per_scale, 1)
    assert torch.equal(dequantize(quantized, dtype), exact.float().to(dtype))


def test_nibbles_hold_even_columns_in_their_low_bits():
    levels = torch.tensor([[1, 2, 15, 0], [0, 15, 8, 7]], dtype=torch.uint8)
    assert pack_nibbles(levels).tolist() == [[0x21, 0x0F], [0xF0, 0x78]]
    every_byte = torch.arange(256, dtype=torch.uint8).view(2, 128)
    assert torch.equal(pack_nibbles(unpack_nibbles(every_byte)), every_byte)
    assert torch.equal(unpack_nibbles(pack_nibbles(levels)), levels)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("value", [0.0, 1.0, -0.37, 3e-8, 1e-30, 60000.0])
def test_a_constant_matrix_is_kept_up_to_the_rounding_of_one_number(form, value):
    """1e-30 is below float16: it may become zero, but not anything larger."""
    weight = torch.full((3, 64), value)
    found = dequantize(quantize(weight, form), torch.float32)
    assert ((found - weight).abs() <= max(abs(value) * 2**-10, 2**-25)).all()
    if value == 0:
        assert (found == 0).all()


@pytest.mark.parametrize("form", GROUPED)
def test_groups_below_the_range_of_float16_use_its_smallest_scale(form):
    torch.manual_seed(0)
    weight = torch.randn(4, 64) * 1e-7  # max / 127 is rounded to 0 in float16
    found = dequantize(quantize(weight, form), torch.float32)
    assert ((found - weight).abs() <= 2**-24).all()
    assert (found - weight).square().sum() < weight.square().sum() / 2


def test_int8_holds_all_magnitudes_of_float32():
    for scale in (1e-30, 1e-20, 1e30):
        weight = torch.linspace(-1, 1, 64).view(1, 64) * scale
        assert torch.allclose(dequantize(quantize(weight, "int8"), torch.float32), weight, rtol=0, atol=scale / 250)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_refused_with_its_row(form, value, monkeypatch):
    monkeypatch.setattr(quantization, "_CHUNK", 2 * 64)
    weight = torch.zeros(7, 64)
    weight[5, 40] = value
    with pytest.raises(ValueError, match=rf"row 5 of the weight holds (nan|inf), .* for {form}; leave it unquantized"):
        quantize(weight, form)


@pytest.mark.parametrize(("form", "value", "limit"), [("int8_groups", 9e6, 127 * 65504), ("int4", -7e4, 65504)])
def test_a_weight_beyond_the_range_of_its_scales_is_refused(form, value, limit):
    weight = torch.full((1, 32), float(limit))
    assert torch.allclose(dequantize(quantize(weight, form), torch.float32), weight)
    weight[0, 3] = value
    with pytest.raises(
        ValueError, match=re.escape(f"holds {abs(value):g}, expected magnitudes of at most {limit:g} for")
    ):
        quantize(weight, form)


@pytest.mark.parametrize("weight", [torch.zeros(4, 48), torch.zeros(64), torch.zeros(4, 32, dtype=torch.int8)])
def test_what_is_no_matrix_of_whole_groups_is_refused(weight):
    with pytest.raises(ValueError, match="expected a floating-point matrix whose columns are a multiple of 32"):
        quantize(weight, "int4")


def test_an_unknown_form_is_refused():
    with pytest.raises(ValueError, match="form='int3' is unknown; choose one of int8, int8_groups, int4"):
        quantize(torch.zeros(1, 32), "int3")
