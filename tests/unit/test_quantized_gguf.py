"""Quantized GGUF files: which layers stay as they are, and that what is served is exactly what is in the file."""

from __future__ import annotations

from collections import Counter

import gguf
import pytest
import torch
from gguf.quants import dequantize as gguf_dequantize

from llama_tp.checkpoint.formats.gguf import GGUFReader
from llama_tp.checkpoint.formats.quantized import dense_tensors
from llama_tp.checkpoint.inspection import inspect_checkpoint
from llama_tp.checkpoint.store.stored import StoredReader
from tests.tiny_gguf import META_TO_GGUF, permuted, write_gguf, write_model
from tests.tiny_huggingface import tiny_model
from tests.tiny_quantized import convert_to, outputs_of

CASES = {
    "Q8_0": ("llama, groups", "Q8_0", {}, {"int8_groups": 15}, 1),
    "Q4_0": ("llama, groups", "Q4_0", {}, {"int4": 15}, 1),
    "Q4_1": ("llama, groups", "Q4_1", {}, {"int4": 15}, 1),
    "tied, so the embedding's blocks are the head": ("llama, groups, tied", "Q8_0", {}, {"int8_groups": 15}, 1),
    "two types of one form in a fused layer": ("llama, groups", "Q4_0", {"ffn_up": "Q4_1"}, {"int4": 15}, 1),
    "two forms in a fused layer": ("llama, groups", "Q4_0", {"ffn_up": "Q8_0"}, {"int4": 11}, 5),
    "attn_v in a type that is widened": ("llama, groups", "Q4_0", {"0.attn_v": "Q5_1"}, {"int4": 12}, 4),
    "a dense layer": ("llama, groups", "Q4_0", {"1.attn_output": "F16"}, {"int4": 14}, 1),
    "a head in Q6_K": ("llama, blocks of 256", "Q4_0", {"output": "Q6_K"}, {"int4": 6}, 3),
    "a head in Q4_K": ("llama, blocks of 256", "Q4_0", {"output": "Q4_K", "attn_output": "Q4_0"}, {"int4": 7}, 2),
    "a tied head in Q5_0": ("llama, groups, tied", "Q4_0", {"token_embd": "Q5_0"}, {"int4": 14}, 1),
    "rotated halves, biases, tied": ("qwen2, groups", "Q4_1", {}, {"int4": 15}, 1),
    "rotated halves, normed heads": ("qwen3, groups", "Q8_0", {}, {"int8_groups": 15}, 1),
    "heads that groups do not divide": ("llama, grouped", "Q8_0", {}, {}, 16),
}
"""model, type of its matrices, others by tensor; forms kept, tensors widened."""


@pytest.fixture(params=CASES)
def case(request, tmp_path):
    """(file, forms kept, tensors widened)."""
    model, kind, kinds, kept, widened = CASES[request.param]
    kinds = dict(sorted(kinds.items(), key=lambda one: -len(one[0])))
    write_model(tmp_path / "a.gguf", tiny_model(model), kind=kind, kinds=kinds)
    return tmp_path / "a.gguf", kept, widened


def expected_weights(path):
    """All tensors as the gguf package dequantizes them, by its names, q and k of Qwen in the order of Llama's."""
    file = gguf.GGUFReader(path)
    architecture = file.fields["general.architecture"].contents()
    heads = {
        kind: file.fields[f"{architecture}.attention.{key}"].contents()
        for kind, key in (("q", "head_count"), ("k", "head_count_kv"))
    }
    weights = {}
    for entry in file.tensors:
        values = gguf_dequantize(entry.data, entry.tensor_type)
        kind = entry.name.split(".")[-2].removeprefix("attn_")
        if architecture != "llama" and kind.removesuffix("_norm") in heads:
            values = permuted(values, 1 if kind.endswith("_norm") else heads[kind])
        weights[entry.name] = torch.from_numpy(values.copy())
    return weights


def gguf_name(name):
    """Of a tensor, from Meta's; layer 0 of tests/tiny_gguf.py stands for all."""
    module, _, parameter = name.rpartition(".")
    if not module.startswith("layers."):
        return f"{META_TO_GGUF[module][0] if module in META_TO_GGUF else 'output'}.{parameter}"
    _, layer, rest = module.split(".", 2)
    names = {"attention.q_norm": "attn_q_norm", "attention.k_norm": "attn_k_norm"}
    stem = names.get(rest) or META_TO_GGUF[f"layers.0.{rest}"][0].removeprefix("blk.0.")
    return f"blk.{layer}.{stem}.{parameter}"


def test_layers_of_our_forms_stay_and_all_numbers_are_those_of_the_gguf_package(case):
    path, kept, widened = case
    reader = GGUFReader(path, torch.float32, keep_quantized=True)
    assert Counter(source.form for source in reader.quantized.values()) == kept
    assert reader.about["widened_tensors"] == widened
    expected = expected_weights(path)
    found = dense_tensors(reader, torch.float32)
    assert {gguf_name(name) for name in found} >= expected.keys()
    for name, source in found.items():
        theirs = expected.get(gguf_name(name), expected["token_embd.weight"])
        assert torch.equal(source.read(0, 0, source.shape[0]), theirs), name


def test_served_tokens_are_those_of_the_dequantized_file(case, tmp_path):
    path, kept, _ = case
    as_it_is = convert_to(path, tmp_path / "kept", dtype="float32")
    widened = convert_to(path, tmp_path / "widened", dtype="float32", quantize="none")
    assert Counter(source.form for source in StoredReader(as_it_is).quantized.values()) == kept
    assert not StoredReader(widened).quantized
    (logits, greedy), (expected_logits, expected_greedy) = outputs_of(as_it_is), outputs_of(widened)
    torch.testing.assert_close(logits, expected_logits, atol=1e-4, rtol=0)
    assert greedy == expected_greedy
    assert len({token for tokens in greedy for token in tokens}) > 4, "outputs differ"


def test_inspect_says_what_stays_and_what_is_widened_before_and_after_conversion(case, tmp_path, run):
    path, kept, widened = case
    folder = convert_to(path, tmp_path / "converted")
    for source, verb in ((path, "become"), (folder, "became")):
        found = inspect_checkpoint(source)
        assert found.quantized == kept
        assert f"quantized tensors that {verb} bfloat16: {widened}" in found.notes
        listed = ", ".join(f"{count} linear layers in {form}" for form, count in kept.items())
        assert f"quantized     {listed or 'no'}\n" in run("inspect", str(source))[1]


def test_a_quantized_vector_is_not_taken_for_a_linear_layer(tmp_path):
    """No converter writes one."""
    kinds = gguf.GGMLQuantizationType
    extra = {"norm": ("output_norm", (64,), kinds.Q8_0)}
    extra |= {f"layers.0.attention.w{one}": (f"blk.0.attn_{one}", (64, 64), kinds.F16) for one in "kv"}
    write_gguf(tmp_path / "a.gguf", extra=extra, heads=2)
    reader = GGUFReader(tmp_path / "a.gguf", keep_quantized=True)
    assert reader.quantized
    assert reader.tensors["norm.weight"].read(0, 0, 64).shape == (64,)


def test_a_damaged_scale_is_refused_by_name_and_nothing_is_left(tmp_path):
    """The disk was blamed for it: "cannot write to ..."."""
    path = tmp_path / "a.gguf"
    write_model(path, tiny_model("llama, groups"), kind="Q8_0")
    entry = next(one for one in gguf.GGUFReader(path).tensors if one.name == "blk.1.ffn_down.weight")
    data = bytearray(path.read_bytes())
    data[entry.data_offset : entry.data_offset + 2] = b"\x00\x7c"  # infinity
    path.write_bytes(data)
    with pytest.raises(
        ValueError, match=r"^layers.1.feed_forward.w2.weight \(Q8_0\) has a block whose scale is not finite"
    ):
        convert_to(path, tmp_path / "converted")
    assert not (tmp_path / "converted").exists()
