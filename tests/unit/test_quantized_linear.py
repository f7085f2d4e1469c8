"""Layers with quantized weights compute the product with the dequantized matrix, by every kernel."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from llama_tp.model import quantized_linear as module
from llama_tp.model.linear import DenseLinear
from llama_tp.model.quantization import QuantizedWeight, dequantize, quantize
from llama_tp.model.quantized_linear import Int4Linear, Int8Linear, QuantizedLinear, quantized_linear
from llama_tp.model.weights import Quantized, num_bytes

FORMS = ["int8", "int8_groups", "int4"]
SCALE_ERROR = 2.0**-9
"""Relative: scales are rounded to bfloat16."""


def weight_of(form, rows=48, columns=96):
    torch.manual_seed(0)
    return quantize(torch.randn(rows, columns), form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(1, 96), (5, 96), (2, 3, 96)])
def test_a_layer_of_any_form_widens_its_weights_in_pieces(form, shape, monkeypatch):
    monkeypatch.setitem(module._PIECE, "cpu", 96 * 7)
    quantized, x, bias = weight_of(form, rows=33), torch.randn(shape), torch.randn(33)
    expected = F.linear(x, dequantize(quantized, torch.float32), bias)
    torch.testing.assert_close(QuantizedLinear(quantized, bias)(x), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("form", "kind"), [("int8", Int8Linear), ("int4", Int4Linear), ("int8_groups", DenseLinear)])
@pytest.mark.parametrize("rows", [16, 27, 48, 2080])
@pytest.mark.parametrize("tokens", [1, 3, 17, 200])
def test_a_cpu_multiplies_in_bfloat16_with_the_same_matrix(form, kind, rows, tokens):
    """Within the rounding of scales, inputs' products and outputs to bfloat16: also where the kernel pads rows, and in
    pieces of 1,024 rows."""
    quantized, bias = weight_of(form, rows=rows), torch.randn(rows).bfloat16()
    x = torch.randn(tokens, 96).bfloat16()
    layer = quantized_linear(quantized, bias, torch.bfloat16)
    assert type(layer) is kind
    out = layer(x)
    assert (out.shape, out.dtype) == ((tokens, rows), torch.bfloat16)
    matrix = dequantize(quantized, torch.float32)
    expected = F.linear(x.float(), matrix, bias.float())
    bound = SCALE_ERROR * F.linear(x.float().abs(), matrix.abs()) + 2.0**-8 * expected.abs() + 2.0**-8 * bias.abs()
    assert ((out.float() - expected).abs() <= 2 * bound + 1e-3).all()


@pytest.mark.parametrize("form", FORMS)
def test_the_matrix_of_a_layer_can_be_read_back(form):
    quantized = weight_of(form, rows=27)
    for dtype in (torch.float32, torch.bfloat16):
        matrix = quantized_linear(quantized, None, dtype).dense_weight().float()
        expected = dequantize(quantized, torch.float32)
        tolerance = 0.0 if dtype == torch.float32 else 3 * SCALE_ERROR * expected.abs().max().item()
        torch.testing.assert_close(matrix, expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [27, 64])
def test_what_a_layer_holds_is_what_its_format_says(form, dtype, rows):
    layer = quantized_linear(weight_of(form, rows=rows), None, getattr(torch, dtype))
    held = Quantized(form).held(rows, 96, dtype, "cpu")
    assert layer.num_bytes == num_bytes(held, getattr(torch, dtype).itemsize)


def test_offsets_in_float32_are_held_in_bfloat16_too():
    quantized = weight_of("int4")
    wide = QuantizedWeight(quantized.weight, quantized.scales, quantized.offsets.float())
    layer = quantized_linear(wide, None, torch.bfloat16)
    assert layer.num_bytes == num_bytes(Quantized("int4", "float32").held(48, 96, "bfloat16", "cpu"), 2)
    x = torch.randn(2, 96).bfloat16()
    assert torch.equal(layer(x), quantized_linear(quantized, None, torch.bfloat16)(x))
