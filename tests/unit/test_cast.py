"""`convert --dtype` rounds every weight to nearest even, refuses what does not fit, and accepts mixed dtypes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llama_tp.checkpoint.convert import MODEL_ARGS, convert
from llama_tp.checkpoint.formats.cast import in_one_dtype
from llama_tp.checkpoint.formats.gguf import GGUFReader
from llama_tp.checkpoint.formats.reader import MemoryReader
from llama_tp.checkpoint.inspection import inspect_checkpoint
from llama_tp.checkpoint.store.stored import StoredReader
from llama_tp.checkpoint.store.verify import verify
from tests.paths import names_in
from tests.tiny_checkpoint import ARGS, meta_tensors, write_meta
from tests.tiny_gguf import write_gguf
from tests.tiny_huggingface import save, tiny_model
from tests.tiny_text import make_sentencepiece_model, make_tokenizer_json

BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32
WQ = "layers.1.attention.wq.weight"


def full(source):
    return source.read(0, 0, source.shape[0])


def converted(source, folder, **options):
    convert(str(source), str(source), None, str(folder), model_args_path=str(folder / MODEL_ARGS), **options)
    return StoredReader(folder)


@pytest.fixture
def originals(tmp_path):
    folder = write_meta(tmp_path / "originals", meta_tensors(FLOAT32), 2)
    make_sentencepiece_model(folder)
    return folder


def all_kinds_of_floats():
    """Normal and subnormal numbers of every exponent up to 2**15, and exact ties of both formats."""
    bits = torch.randint(0, 1 << 31, (400_000,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    values = bits.view(FLOAT32)
    ties = torch.arange(1 << 15, dtype=torch.int32) << 16 | 0x8000
    halves = torch.arange(0, 2048, dtype=FLOAT32) + 0.5
    values = torch.cat([values, -values, ties.view(FLOAT32), halves, torch.zeros(1), -torch.zeros(1)])
    return values[values.abs() <= 2.0**15]


def rounded_by_integers(values):
    """bfloat16, as the upper half of the bits of float32, plus one where the lower half is more than a half, or a half
    and the upper is odd."""
    bits = values.numpy().view(np.uint32).astype(np.uint64)
    return torch.from_numpy(((bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16).astype(np.uint32).view(np.float32))


def rounded_by_numpy(values):
    return torch.from_numpy(values.numpy().astype(np.float16).astype(np.float32))


@pytest.mark.parametrize(("dtype", "oracle"), [(BFLOAT16, rounded_by_integers), (FLOAT16, rounded_by_numpy)])
def test_values_are_rounded_to_nearest_even(dtype, oracle):
    values = all_kinds_of_floats()
    tensors = {**meta_tensors(FLOAT32), "norm.weight": values}
    found = full(in_one_dtype(MemoryReader.of(ARGS, tensors), dtype).tensors["norm.weight"])
    assert found.dtype == dtype
    assert torch.equal(found.float().view(torch.int32), oracle(values).view(torch.int32))
    assert len(found.float().unique()) > 10_000


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_all_tensors_are_converted_and_the_manifest_says_from_what(originals, tmp_path, dtype):
    reader = converted(originals, tmp_path / "converted", dtype=dtype)
    wanted = getattr(torch, dtype)
    for name, tensor in meta_tensors(FLOAT32).items():
        assert torch.equal(full(reader.tensors[name]), tensor.to(wanted)), name
    about = json.loads((tmp_path / "converted" / "manifest.json").read_text())["about"]
    assert (about["dtype"], about["source_dtype"]) == (dtype, "float32")


def test_without_a_dtype_that_of_the_source_is_kept(originals, tmp_path):
    reader = converted(originals, tmp_path / "converted")
    assert reader.dtype == FLOAT32
    assert "source_dtype" not in json.loads((tmp_path / "converted" / "manifest.json").read_text())["about"]


def test_half_precision_becomes_float32_exactly(tmp_path):
    for dtype in (BFLOAT16, FLOAT16):
        tensors = meta_tensors(dtype)
        reader = in_one_dtype(MemoryReader.of(ARGS, tensors), FLOAT32)
        assert all(torch.equal(full(reader.tensors[name]), tensor.float()) for name, tensor in tensors.items())


@pytest.mark.parametrize(("value", "fits"), [(65504.0, True), (65519.9, True), (65520.0, False), (-1e30, False)])
def test_a_weight_that_float16_cannot_hold_is_refused_by_name(tmp_path, value, fits):
    tensors = meta_tensors(FLOAT32)
    tensors[WQ][3, 5] = value
    folder = write_meta(tmp_path / "originals", tensors)
    make_sentencepiece_model(folder)
    if fits:
        assert full(converted(folder, tmp_path / "out", dtype="float16").tensors[WQ])[3, 5] == 65504
        return
    words = rf"^{WQ} has a weight of magnitude {abs(value):g}, but float16 ends at 65504: pass --dtype float32$"
    with pytest.raises(ValueError, match=words.replace("+", r"\+")):
        converted(folder, tmp_path / "out", dtype="float16")
    assert names_in(tmp_path) == ["originals"]
    assert full(converted(folder, tmp_path / "out", dtype="bfloat16").tensors[WQ])[3, 5].isfinite()


def test_damaged_weights_are_still_said_to_be_damaged(tmp_path):
    tensors = meta_tensors(FLOAT32)
    tensors[WQ][3, 5] = float("inf")
    folder = write_meta(tmp_path / "originals", tensors)
    make_sentencepiece_model(folder)
    with pytest.raises(ValueError, match=rf"{WQ} has non-finite weights .*: the originals are damaged"):
        converted(folder, tmp_path / "out", dtype="float16")


def with_norms_in_float32(folder):
    """As several fine-tuning programs save models."""
    path = save(tiny_model("llama, grouped"), folder, BFLOAT16) / "model.safetensors"
    weights = load_file(path)
    save_file({name: w.float() if "norm" in name else w for name, w in weights.items()}, path, {"format": "pt"})
    make_tokenizer_json(folder)
    return folder, weights


def test_mixed_dtypes_need_a_dtype_and_the_message_says_so(tmp_path):
    folder, _ = with_norms_in_float32(tmp_path / "mixed")
    with pytest.raises(
        ValueError, match=r"mixed: .*norm\.weight is float32, but .*bfloat16: pass --dtype bfloat16"
    ) as error:
        converted(folder, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert names_in(tmp_path) == ["mixed"]
    reader = converted(folder, tmp_path / "out", dtype="float32")
    verify(tmp_path / "out")
    assert reader.dtype == FLOAT32
    assert reader.about["source_dtype"] == "bfloat16, float32"
    assert "some tensors are float32: pass --dtype to `llama-tp convert`, which writes all in one dtype" in (
        inspect_checkpoint(folder).notes
    )


def test_mixed_dtypes_in_metas_shards_are_converted_too(tmp_path):
    tensors = {name: t.float() if t.dim() == 1 else t for name, t in meta_tensors(BFLOAT16).items()}
    folder = write_meta(tmp_path / "originals", tensors, 2)
    make_sentencepiece_model(folder)
    with pytest.raises(ValueError, match=r"norm\.weight is float32, but .*pass --dtype"):
        converted(folder, tmp_path / "out")
    reader = converted(folder, tmp_path / "out", dtype="float32")
    assert all(torch.equal(full(reader.tensors[name]), tensor.float()) for name, tensor in tensors.items())


def test_quantized_weights_are_rounded_once(tmp_path):
    """And not to bfloat16 before, their default."""
    expected = write_gguf(tmp_path / "a.gguf")
    path = str(tmp_path / "a.gguf")
    for dtype in ("float32", "float16"):
        out = tmp_path / dtype
        convert(path, None, None, str(out), model_args_path=str(out / MODEL_ARGS), dtype=dtype)
        found = StoredReader(out)
        assert all(torch.equal(full(found.tensors[n]), t.to(found.dtype)) for n, t in expected.items()), dtype
        assert found.dtype == getattr(torch, dtype)
    assert GGUFReader(tmp_path / "a.gguf").dtype == BFLOAT16


@pytest.mark.parametrize("dtype", ["int8", "fp16", ""])
def test_another_dtype_is_refused_before_anything_is_read(tmp_path, dtype):
    with pytest.raises(ValueError, match=rf"^dtype='{dtype}' must be one of bfloat16, float16, float32; leave it out"):
        convert("nowhere", "nowhere", dtype=dtype)
