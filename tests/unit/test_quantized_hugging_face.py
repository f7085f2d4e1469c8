"""Hugging Face models in GPTQ and AWQ: kept as they are, the same numbers and tokens as transformers' dense model."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file

from llama_tp.checkpoint.formats.huggingface import HuggingFaceReader, hugging_face_name
from llama_tp.checkpoint.formats.open import open_checkpoint
from llama_tp.checkpoint.formats.quantized import dense_tensors, num_bytes
from llama_tp.checkpoint.formats.rotary import in_halves, is_rotated
from llama_tp.checkpoint.inspection import inspect_checkpoint
from llama_tp.checkpoint.store.stored import StoredReader
from tests.tiny_huggingface import edit_config, save, tiny_model
from tests.tiny_quantized import (
    convert_to,
    edit_tensors,
    in_two_files,
    outputs_of,
    outputs_of_transformers,
    quantize_folder,
)

CASES = {
    "GPTQ of 128": ("llama, groups of 128", "gptq", 128, {}),
    "GPTQ of 32, biases, tied": ("qwen2, groups", "gptq", 32, {}),
    "GPTQ of whole rows": ("llama, groups of 128", "gptq", -1, {}),
    "GPTQ v2 of 64, normed heads": ("qwen3, groups", "gptq_v2", 64, {}),
    "AWQ of 128, biases, tied": ("qwen2, groups", "awq", 128, {}),
    "AWQ of 32": ("llama, groups of 128", "awq", 32, {}),
    "AWQ with a packed head": ("llama, groups of 128", "awq", 64, {"skipped": ()}),
    "AWQ without one layer's feed-forward": (
        "llama, groups of 128",
        "awq",
        64,
        {"skipped": ("lm_head", "0.mlp.gate_proj", "0.mlp.up_proj", "0.mlp.down_proj")},
    ),
    "GPTQ without one layer of a fused group": (
        "llama, groups of 128",
        "gptq",
        64,
        {"skipped": ("lm_head", "1.self_attn.k_proj")},
    ),
}
"""model, method, group, options of quantize_folder."""
KEPT = {
    "AWQ with a packed head": 15,
    "AWQ without one layer's feed-forward": 11,
    "GPTQ without one layer of a fused group": 11,
}


def quantized_folder(folder, name="GPTQ of 128"):
    """(the model with the dequantized weights, their values by transformers' names)."""
    kind, method, group_size, options = CASES[name]
    save(tiny_model(kind), folder, torch.float16)
    model = tiny_model(kind)  # one that was float16 would have rounded its rotary frequencies
    for weight in model.parameters():
        weight.copy_(weight.half())
    config = {"modules_to_not_convert": list(options["skipped"])} if options else {}
    dense = quantize_folder(folder, method, group_size, **options, **config)
    model.load_state_dict(dense, strict=False)
    return model, dense


@pytest.fixture(params=CASES)
def case(request, tmp_path):
    """(folder, model of transformers, number of layers kept)."""
    model, dense = quantized_folder(tmp_path / "model", request.param)
    assert sum(map(torch.numel, dense.values())) > 10_000
    return tmp_path / "model", model, KEPT.get(request.param, 14)


def test_packed_layers_are_kept_and_all_weights_are_those_of_the_definition(case):
    folder, model, num_kept = case
    reader = open_checkpoint(folder, dequantized=torch.float32)
    assert Counter(source.form for source in reader.quantized.values()) == {"int4": num_kept}
    expected = model.state_dict()
    for name, source in dense_tensors(reader, torch.float32).items():
        found = source.read(0, 0, source.shape[0]).float()
        if is_rotated(name):
            found = in_halves(found, reader.args.head_dim)
        assert torch.equal(found, expected[hugging_face_name(name)]), name


def test_logits_and_greedy_tokens_are_those_of_transformers(case, tmp_path):
    folder, model, num_kept = case
    converted = convert_to(folder, tmp_path / "converted", dtype="float32")
    assert len(StoredReader(converted).quantized) == num_kept
    assert StoredReader(converted).about["quantized_layers"] == {"int4": num_kept}
    logits, greedy = outputs_of(converted)
    expected_logits, expected_greedy = outputs_of_transformers(model)
    torch.testing.assert_close(logits, expected_logits, atol=1e-4, rtol=0)
    assert greedy == expected_greedy
    assert len({token for tokens in greedy for token in tokens}) > 4, "outputs differ"


def test_without_quantization_all_layers_are_dense_and_rounded_once(tmp_path):
    """A layer that cannot stay quantized was rounded to float16 first, whatever --dtype was."""
    model, dense = quantized_folder(tmp_path / "model", "GPTQ without one layer of a fused group")
    converted = convert_to(tmp_path / "model", tmp_path / "converted", dtype="float32", quantize="none")
    reader, expected = StoredReader(converted), model.state_dict()
    assert not reader.quantized
    assert reader.args.quantization_group == 1
    for name, source in reader.tensors.items():
        found = source.read(0, 0, source.shape[0])
        found = in_halves(found, reader.args.head_dim) if is_rotated(name) else found
        assert torch.equal(found, expected[hugging_face_name(name)]), name
    assert any(not torch.equal(weight, weight.half().float()) for weight in dense.values())


def test_biases_of_zero_that_the_architecture_lacks_are_left_out(tmp_path):
    """AutoGPTQ wrote one for every layer. Others are weights of another model."""
    quantized_folder(tmp_path)
    names = ("self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    zeros = {f"model.layers.0.{name}.bias": torch.zeros(256).half() for name in names}
    edit_tensors(tmp_path, zeros)
    assert len(HuggingFaceReader(tmp_path).quantized) == 14
    edit_tensors(tmp_path, {"model.layers.0.mlp.gate_proj.bias": torch.ones(256).half()})
    with pytest.raises(ValueError, match=r"unexpected: model\.layers\.0\.mlp\.gate_proj\.bias; expected those of"):
        HuggingFaceReader(tmp_path)


def test_files_that_hold_packed_layers_only_are_counted(tmp_path):
    quantized_folder(tmp_path)
    in_two_files(tmp_path, (".qweight", ".qzeros", ".scales", ".g_idx"))
    files = sorted(tmp_path.glob("*.safetensors"))
    found = inspect_checkpoint(tmp_path)
    assert (found.files, found.num_bytes) == (2, sum(path.stat().st_size for path in files))


def test_inspect_says_what_is_quantized_and_what_a_rank_holds(tmp_path, run):
    quantized_folder(tmp_path / "model")
    converted = convert_to(tmp_path / "model", tmp_path / "converted")
    run("--version")  # what the conversion printed is gone
    for folder in (tmp_path / "model", converted):
        found = json.loads(run("inspect", str(folder), "--json")[1])
        assert found["quantized"] == {"int4": 14}
        assert found["dtype"] == "float16"
        assert found["memory_per_rank"][0]["weights"] == num_bytes(StoredReader(converted))
        assert "quantized     14 linear layers in int4\n" in run("inspect", str(folder))[1]


def config_with(**changes):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())["quantization_config"]
        edit_config(folder, quantization_config={**config, **changes})

    return change


def tensor_with(kind, make):
    def change(folder):
        name = f"model.layers.1.mlp.down_proj.{kind}"
        edit_tensors(folder, {name: make(load_file(folder / "model.safetensors")[name])})

    return change


REFUSED = {
    "groups in another order": (
        tensor_with("g_idx", lambda one: one.flip(0)),
        r"layers\.1\.mlp\.down_proj\.g_idx does not number .* desc_act=true",
    ),
    "8 bits": (config_with(bits=8), "bits=8, supported is 4; use the model's original weights"),
    "another group size": (config_with(group_size=64), r"q_proj\.qzeros has shape \(1, 16\), expected \(2, 16\)"),
    "no zeros": (tensor_with("qzeros", lambda _: None), r"mlp\.down_proj\.qzeros is missing; download"),
    "no scales": (tensor_with("scales", lambda _: None), r"mlp\.down_proj\.scales is missing; download"),
    "scales of other rows": (tensor_with("scales", lambda one: one[:, 8:].clone()), r"scales has shape \(2, 120\)"),
    "a smaller matrix": (
        tensor_with("qweight", lambda one: one[:16].clone()),
        r"down_proj\.qzeros has shape \(2, 16\), expected \(1, 16\)",
    ),
    "bitsandbytes": (config_with(quant_method="bitsandbytes"), "quant_method='bitsandbytes', supported is"),
    "fp8": (config_with(quant_method="fp8"), "quant_method='fp8', supported is"),
    "compressed-tensors": (config_with(quant_method="compressed-tensors"), "quant_method='compressed-tensors'"),
    "no method": (lambda folder: edit_config(folder, quantization_config=None), "is I32, expected BF16, F16, F32"),
    "AWQ as GPTQ": (config_with(quant_method="awq"), r"q_proj has 16 columns, which group_size=128 must divide"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_is_not_supported_or_damaged_is_refused_in_one_line_with_the_folder(tmp_path, fault):
    change, message = REFUSED[fault]
    quantized_folder(tmp_path)
    HuggingFaceReader(tmp_path)
    change(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        HuggingFaceReader(tmp_path)
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_scales_beyond_float16_are_refused_by_name_and_nothing_is_left(tmp_path):
    quantized_folder(tmp_path / "model")
    tensor_with("scales", lambda one: one.float() * 1e9)(tmp_path / "model")
    with pytest.raises(ValueError, match=r"^model\.layers\.1\.mlp\.down_proj\.scales .* values that float16 cannot"):
        convert_to(tmp_path / "model", tmp_path / "converted")
    assert not (tmp_path / "converted").exists()
