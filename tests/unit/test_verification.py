"""`llama-tp verify` looks at what a manifest cannot know: whether the content of the files is a model."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch

from llama_tp.checkpoint.convert import convert
from llama_tp.checkpoint.export import export
from llama_tp.checkpoint.store import manifest as manifest_module
from llama_tp.checkpoint.store.manifest import MANIFEST, load_manifest, write_manifest
from llama_tp.checkpoint.store.table import TABLE, load_table
from llama_tp.cli.checkpoints import verify
from llama_tp.model.weights import weight_shapes
from llama_tp.model_args import ModelArgs
from tests.tiny_checkpoint import flip_bit, write_meta
from tests.tiny_converted import convert_beside, write_originals
from tests.tiny_text import make_sentencepiece_model


@pytest.fixture
def folder(tmp_path):
    return convert_beside(write_originals(tmp_path / "originals"))


def rewrite_manifest(folder):
    """As if all had been written as it is now."""
    write_manifest(folder, about=load_manifest(folder).about)


def poison(folder, name, indices, value):
    """Overwrite one entry of a stored tensor, and record the file's new hash."""
    tensor = load_table(folder, load_manifest(folder))[name]
    for chunk in tensor.chunks:
        within = list(indices)
        within[tensor.dim] -= chunk.start
        if 0 <= within[tensor.dim] < chunk.length:
            shape = tensor.chunk_shape(chunk)
            flat = sum(index * math.prod(shape[dim + 1 :]) for dim, index in enumerate(within))
            with (folder / chunk.file).open("r+b") as file:
                file.seek(chunk.offset + flat * tensor.dtype.itemsize)
                file.write(bytes(torch.tensor([value], dtype=tensor.dtype).view(torch.uint8).tolist()))
            rewrite_manifest(folder)
            return
    raise AssertionError(f"{name} has no entry {indices}")


def test_what_is_right_is_said_in_one_line(folder, capsys):
    verify(str(folder))
    assert capsys.readouterr().out == (
        f"{folder}: 5 files match the manifest, 21 tensors have the shapes and dtypes of model_args.json and finite "
        "values, the tokenizer fits the 512 rows of the embedding\n"
    )


@pytest.mark.parametrize(
    ("name", "indices", "value", "said"),
    [
        ("tok_embeddings.weight", [511, 63], math.nan, "nan"),
        ("layers.1.feed_forward.w2.weight", [3, 170], -math.inf, "-inf"),  # cut in columns
        ("layers.0.attention.wk.weight", [31, 0], math.inf, "inf"),
        ("norm.weight", [7], math.nan, "nan"),
    ],
)
@pytest.mark.parametrize("block", [4 << 20, 1001])
def test_a_number_that_is_not_finite_is_named_although_the_manifest_matches(
    folder, monkeypatch, block, name, indices, value, said
):
    """Also where blocks end within numbers."""
    monkeypatch.setattr(manifest_module, "_BLOCK", block)
    verify(str(folder))
    poison(folder, name, indices, value)
    with pytest.raises(ValueError, match=re.escape(f"{name} is {said} at {indices}")) as error:
        verify(str(folder))
    assert "\n" not in str(error.value)


def test_any_number_of_a_small_tensor_is_looked_at(folder, monkeypatch):
    monkeypatch.setattr(manifest_module, "_BLOCK", 97)
    for index in range(0, 64, 7):
        poison(folder, "layers.1.ffn_norm.weight", [index], math.nan)
        with pytest.raises(ValueError, match=rf"layers\.1\.ffn_norm\.weight is nan at \[{index}\]"):
            verify(str(folder))
        poison(folder, "layers.1.ffn_norm.weight", [index], 1.0)
    verify(str(folder))


def test_the_first_of_several_is_named(folder):
    poison(folder, "tok_embeddings.weight", [300, 5], math.nan)
    poison(folder, "tok_embeddings.weight", [20, 9], math.inf)
    with pytest.raises(ValueError, match=r"is inf at \[20, 9\]"):
        verify(str(folder))


@pytest.mark.parametrize("kind", ["scales", "offsets"])
def test_scales_and_offsets_of_quantized_layers_are_numbers_too(tmp_path, kind):
    """Integers are not: any byte is one."""
    params = {"dim": 64, "n_layers": 1, "n_heads": 2, "vocab_size": 512, "norm_eps": 1e-5, "multiple_of": 64}
    originals = tmp_path / "originals"
    shapes = weight_shapes(ModelArgs.from_params(params))
    write_meta(originals, {name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}, params=params)
    make_sentencepiece_model(originals)
    folder = tmp_path / "out"
    convert(str(originals), None, None, str(folder), model_args_path=str(tmp_path / "args.json"), quantize="int4")
    verify(str(folder))
    poison(folder, "layers.0.attention.wq.weight", [0, 0], 255)
    verify(str(folder))
    poison(folder, f"layers.0.attention.wq.{kind}", [5, 1], math.nan)
    with pytest.raises(ValueError, match=rf"wq\.{kind} is nan at \[5, 1\]"):
        verify(str(folder))


def test_damage_is_reported_by_the_hash_and_not_by_the_values_that_it_led_to(folder):
    poison(folder, "norm.weight", [0], math.nan)
    flip_bit(next(folder.glob("*.distcp")), 1000)
    with pytest.raises(ValueError, match="is corrupt: its sha256"):
        verify(str(folder))


def test_tensors_that_are_not_those_of_model_args_are_named(folder):
    table = json.loads((folder / TABLE).read_text())
    one = table["layers.0.attention.wk.weight"]
    one["shape"] = [one["shape"][0], one["shape"][1] // 2]
    (folder / TABLE).write_text(json.dumps(table))
    rewrite_manifest(folder)
    with pytest.raises(ValueError, match=r"layers\.0\.attention\.wk\.weight has shape \(32, 32\) in the checkpoint"):
        verify(str(folder))


def test_one_tensor_of_another_dtype_is_named(folder):
    table = json.loads((folder / TABLE).read_text())
    table["norm.weight"]["dtype"] = "float16"
    (folder / TABLE).write_text(json.dumps(table))
    rewrite_manifest(folder)
    with pytest.raises(ValueError, match=r"norm\.weight is float16, expected bfloat16"):
        verify(str(folder))


def test_a_tokenizer_with_more_tokens_than_the_embedding_has_rows_is_refused(folder, tmp_path):
    make_sentencepiece_model(tmp_path, vocab_size=600)
    (tmp_path / "tokenizer.model").replace(folder / "tokenizer.model")
    rewrite_manifest(folder)
    with pytest.raises(ValueError, match="512"):
        verify(str(folder))


def test_an_exported_folder_has_its_files_checked(folder, tmp_path, capsys):
    export(folder, tmp_path / "hf", format="hf")
    capsys.readouterr()
    verify(str(tmp_path / "hf"))
    assert capsys.readouterr().out.endswith("files match the manifest\n")
    assert (tmp_path / "hf" / MANIFEST).is_file()
