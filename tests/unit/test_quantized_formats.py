"""Quantized matrices of GGUF, GPTQ and AWQ are read bit for bit, whole and in parts.

tests/data/gptq_awq.safetensors holds layers (32, 256) packed by others, each with its configuration and as "dense" the
float16 weights that its packer reads back: AutoGPTQ (commit 9f7d370, qlinear_cuda_old.py), GPTQModel 7.7.0
(pack_original), AutoAWQ 0.2.9 (WQLinear_GEMM).
"""

from __future__ import annotations

import json

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize as gguf_dequantize
from safetensors import safe_open

from llama_tp.checkpoint.formats.quantization_config import QuantizationConfig, read_quantization
from llama_tp.checkpoint.formats.quantized import RotaryQuantized
from llama_tp.checkpoint.formats.quantized_awq import AwqQuantized
from llama_tp.checkpoint.formats.quantized_gguf import FORM_OF, GgufQuantized
from llama_tp.checkpoint.formats.quantized_gptq import GptqQuantized
from llama_tp.checkpoint.formats.reader import MemoryTensor
from llama_tp.checkpoint.formats.rotary import RotaryTensor
from llama_tp.model.quantization import dequantize
from llama_tp.model.weights import GROUP
from tests.paths import ROOT

PACKED = ROOT / "tests" / "data" / "gptq_awq.safetensors"
LAYERS = {
    "autogptq_sym": torch.float16,
    "autogptq_asym": torch.float32,
    "autogptq_channel": torch.float16,
    "gptqmodel_v2": torch.float32,
    "gptqmodel_v1_underflow": torch.float32,
    "autoawq_128": torch.float32,
    "autoawq_32": torch.float32,
}
"""Layers of the file, and the dtype of their offsets: float16 where all zeros are 8."""
PARTS = [(0, 0, 32), (0, 5, 1), (0, 7, 18), (0, 24, 8), (1, 0, 256), (1, 32, 32), (1, 96, 160), (1, 224, 32)]
"""(dim, start, length)"""


def packed_layer(name):
    """(configuration, tensors, weights)."""
    with safe_open(PACKED, "pt") as file:
        config = json.loads(file.metadata()[name])
        keys = [key for key in file.keys() if key.startswith(f"{name}.")]  # noqa: SIM118
        tensors = {key.removeprefix(f"{name}."): file.get_tensor(key) for key in keys}
    return config, tensors, tensors.pop("dense")


def open_layer(config, tensors):
    read = read_quantization({"quantization_config": config})
    sources = {key: MemoryTensor(tensor) for key, tensor in tensors.items()}
    if read.method == "awq":
        return AwqQuantized("q_proj", sources, read.group_size)
    return GptqQuantized("q_proj", sources, read.group_size, zeros_less_one=read.zeros_less_one)


def random_blocks(kind, rows, groups):
    """All bytes random, except that scales are finite; the first ones are the extremes of float16."""
    rng = np.random.default_rng(0)
    size = {"Q8_0": 34, "Q4_0": 18, "Q4_1": 20}[kind]
    blocks = rng.integers(0, 256, (rows, groups, size), dtype=np.uint8)
    for offset in (0, 2) if kind == "Q4_1" else (0,):
        numbers = (rng.standard_normal((rows, groups)) * 10.0 ** rng.integers(-8, 4, (rows, groups))).astype(np.float16)
        largest = 8188 if kind == "Q4_0" else 65504
        numbers.reshape(-1)[:6] = [0, -0.0, 2**-24, -(2**-24), largest, -largest][: numbers.size]
        blocks[:, :, offset : offset + 2] = numbers.view(np.uint8).reshape(rows, groups, 2)
    return blocks.reshape(rows, -1)


@pytest.mark.parametrize("kind", FORM_OF)
def test_gguf_blocks_are_the_weights_that_the_gguf_package_reads(kind):
    blocks = random_blocks(kind, 24, 8)
    expected = torch.from_numpy(gguf_dequantize(blocks, gguf.GGMLQuantizationType[kind]))
    source = GgufQuantized("blk.0.ffn_up.weight", kind, blocks)
    assert (source.shape, source.form) == ((24, 256), FORM_OF[kind])
    for dim, start, length in [(0, 0, 24), (0, 5, 7), (1, 0, 256), (1, 64, 96)]:
        part = source.read(dim, start, length)
        assert part.form == source.form
        assert torch.equal(dequantize(part, torch.float32), expected.narrow(dim, start, length)), (dim, start)


@pytest.mark.parametrize("kind", FORM_OF)
def test_a_quantized_tensor_of_a_real_gguf_file_is_read(kind, tmp_path):
    """Written and mapped read-only by the gguf package."""
    weight = np.random.default_rng(0).standard_normal((16, 64), np.float32)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_tensor(
        "a",
        gguf.quants.quantize(weight, gguf.GGMLQuantizationType[kind]),
        raw_dtype=gguf.GGMLQuantizationType[kind],
    )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (entry,) = gguf.GGUFReader(tmp_path / "a.gguf").tensors
    source = GgufQuantized(entry.name, entry.tensor_type.name, entry.data)
    assert source.shape == tuple(reversed(entry.shape.tolist()))
    expected = torch.from_numpy(gguf_dequantize(entry.data, entry.tensor_type))
    assert torch.equal(dequantize(source.read(0, 3, 9), torch.float32), expected[3:12])


@pytest.mark.parametrize("kind", FORM_OF)
def test_reordered_rows_are_those_of_the_reordered_dense_tensor(kind):
    blocks = random_blocks(kind, 24, 2)
    dense = torch.from_numpy(gguf_dequantize(blocks, gguf.GGMLQuantizationType[kind]))
    expected = RotaryTensor(MemoryTensor(dense), head_dim=8)
    source = RotaryQuantized(GgufQuantized("blk.0.attn_q.weight", kind, blocks), head_dim=8)
    assert (source.shape, source.form) == ((24, 64), FORM_OF[kind])
    for part in [(0, 0, 24), (0, 3, 6), (0, 13, 11), (1, 32, 32)]:
        assert torch.equal(dequantize(source.read(*part), torch.float32), expected.read(*part)), part


@pytest.mark.parametrize(("kind", "scale"), [("Q8_0", np.inf), ("Q4_1", np.nan), ("Q4_0", 8192), ("Q4_0", -np.inf)])
def test_a_block_whose_scale_or_offset_is_not_finite_is_refused(kind, scale):
    blocks = random_blocks(kind, 2, 2)
    blocks[1, :2] = np.array([scale], np.float16).view(np.uint8)
    source = GgufQuantized("blk.3.attn_k.weight", kind, blocks)
    source.read(0, 0, 1)
    with pytest.raises(ValueError, match=rf"blk.3.attn_k.weight \({kind}\) has a block whose scale is not finite"):
        source.read(0, 1, 1)


@pytest.mark.parametrize("name", LAYERS)
def test_gptq_and_awq_layers_are_the_weights_that_their_writers_read(name):
    config, tensors, expected = packed_layer(name)
    source = open_layer(config, tensors)
    assert (source.shape, source.form) == ((32, 256), "int4")
    for dim, start, length in PARTS:
        part = source.read(dim, start, length)
        assert (part.weight.dtype, part.scales.dtype, part.offsets.dtype) == (torch.uint8, torch.float16, LAYERS[name])
        shape = (length, 256) if dim == 0 else (32, length)
        assert part.shape == shape
        assert part.scales.shape == part.offsets.shape == (shape[0], shape[1] // GROUP)
        assert torch.equal(dequantize(part, torch.float16), expected.narrow(dim, start, length)), (dim, start)


def test_the_fixtures_are_as_different_as_they_are_meant_to_be():
    """Zeros of 0, of which one less does not fit in four bits; zeros other than 8; weights of all levels."""
    for name in LAYERS:
        config, tensors, dense = packed_layer(name)
        assert len(tensors["qweight"].view(torch.uint8).unique()) > 100
        assert dense.abs().max() > 0.05
        if config["quant_method"] == "gptq" and not config["sym"]:
            assert len(tensors["qzeros"].view(torch.uint8).unique()) > 10
    config, tensors, _ = packed_layer("gptqmodel_v2")
    assert (tensors["qzeros"] & 15 == 0).any()


def test_reordered_rows_of_gptq_are_those_of_the_reordered_dense_tensor():
    config, tensors, dense = packed_layer("autogptq_asym")
    source, expected = RotaryQuantized(open_layer(config, tensors), 8), RotaryTensor(MemoryTensor(dense), 8)
    for part in [(0, 0, 32), (0, 3, 6), (0, 13, 11), (1, 32, 64)]:
        assert torch.equal(dequantize(source.read(*part), torch.float16), expected.read(*part)), part


def test_scales_in_bfloat16_are_kept_exactly_or_refused():
    config, tensors, _ = packed_layer("autogptq_sym")
    tensors["scales"] = tensors["scales"].bfloat16()
    assert torch.equal(open_layer(config, tensors).read(0, 0, 32).scales.bfloat16()[:, 0], tensors["scales"][0])
    for value in (1e-30, 1e5, float("nan"), float("inf")):
        tensors["scales"][1, 9] = value
        with pytest.raises(ValueError, match=r"q_proj.scales \(torch.bfloat16\) holds values that float16 cannot"):
            open_layer(config, tensors).read(0, 9, 1)


def test_groups_in_another_order_are_refused():
    config, tensors, _ = packed_layer("autogptq_sym")
    config["desc_act"] = True
    open_layer(config, tensors)  # static groups: the order is that of the columns
    tensors["g_idx"] = tensors["g_idx"].flip(0)
    with pytest.raises(ValueError, match=r"q_proj.g_idx does not number .* desc_act=true, which is not supported"):
        open_layer(config, tensors)


@pytest.mark.parametrize("name", ["autogptq_sym", "autoawq_128"])
def test_tensors_that_do_not_fit_together_are_refused(name):
    config, tensors, _ = packed_layer(name)
    with pytest.raises(ValueError, match=r"q_proj.scales has shape \(1, 32\), expected \(2, 32\) from qweight"):
        open_layer(config, {**tensors, "scales": tensors["scales"][:1]})
    with pytest.raises(ValueError, match=r"q_proj.qzeros has shape \(2, 3\), expected \(2, 4\) from qweight"):
        open_layer(config, {**tensors, "qzeros": tensors["qzeros"][:, :3]})
    with pytest.raises(ValueError, match=r"q_proj.qweight has shape \(1024,\), expected a matrix; download"):
        open_layer(config, {**tensors, "qweight": tensors["qweight"].flatten()})
    with pytest.raises(ValueError, match=r"q_proj.qweight is torch.int64, expected torch.int32; download"):
        open_layer(config, {**tensors, "qweight": tensors["qweight"].long()})
    with pytest.raises(ValueError, match=r"q_proj.qzeros is missing; download the model again"):
        open_layer(config, {key: tensor for key, tensor in tensors.items() if key != "qzeros"})
    with pytest.raises(ValueError, match=r"q_proj has 256 columns, which group_size=96 must divide"):
        open_layer({**config, "group_size": 96}, tensors)


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True}


@pytest.mark.parametrize(
    ("written", "read"),
    [
        (GPTQ, QuantizationConfig("gptq", 128, True)),
        ({**GPTQ, "checkpoint_format": "gptq_v2", "group_size": 32}, QuantizationConfig("gptq", 32, False)),
        ({**GPTQ, "format": "gptq_v2", "group_size": -1}, QuantizationConfig("gptq", None, False)),
        ({**GPTQ, "checkpoint_format": "gptq", "format": "gptq_v2"}, QuantizationConfig("gptq", 128, True)),
        (AWQ, QuantizationConfig("awq", 128, False)),
        (
            {**AWQ, "version": "GEMM", "modules_to_not_convert": ["lm_head"]},
            QuantizationConfig("awq", 128, False),
        ),
        (
            {"quant_method": "awq", "bits": 4, "format": "gemm", "backend": "marlin"},
            QuantizationConfig("awq", 128, False),
        ),
        (None, None),
    ],
)
def test_the_configuration_is_read(written, read):
    assert read_quantization({} if written is None else {"quantization_config": written}) == read


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True},
            r"quant_method='bitsandbytes', supported is quant_method",
        ),
        ({"quant_method": "fp8"}, r"quant_method='fp8'"),
        ({"quant_method": "compressed-tensors"}, r"quant_method='compressed-tensors'"),
        ({"bits": 4}, r"quant_method=None"),
        ({**GPTQ, "bits": 8}, r"bits=8, supported is 4"),
        ({**GPTQ, "bits": None}, r"bits=None, supported is 4"),
        ({**GPTQ, "bits": True}, r"bits=True, supported is 4"),
        ({**GPTQ, "group_size": 48}, r"group_size=48, supported are multiples of 32"),
        ({**GPTQ, "group_size": 0}, r"group_size=0, supported"),
        ({**GPTQ, "group_size": "128"}, r"group_size='128', supported"),
        ({**GPTQ, "checkpoint_format": "marlin"}, r"checkpoint_format='marlin', supported is 'gptq' or 'gptq_v2'"),
        ({**GPTQ, "is_marlin_format": True}, r"is_marlin_format=true"),
        ({**GPTQ, "pack_dtype": "int64"}, r"pack_dtype='int64', supported is 'int32'"),
        ({**GPTQ, "dynamic": {"-:.*": {}}}, r"has dynamic, which gives layers settings of their own"),
        ({**AWQ, "version": "gemv"}, r"version='gemv', supported is 'gemm'"),
        ({**AWQ, "zero_point": False}, r"zero_point=False, supported is True"),
        ({**AWQ, "backend": "llm-awq"}, r"backend='llm-awq', which stores weights in another order"),
        ([], r"quantization_config=\[\] must be an object"),
    ],
)
def test_what_is_not_supported_is_refused_by_name_with_a_remedy(written, message):
    with pytest.raises(ValueError, match=message) as error:
        read_quantization({"quantization_config": written})
    assert len(str(error.value).splitlines()) == 1
    assert any(remedy in str(error.value) for remedy in ("; use the model's original weights", "download", "expected"))
