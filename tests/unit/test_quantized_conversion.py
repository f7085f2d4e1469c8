"""Quantized checkpoints on their way: made from every dense format, planned, described, exported, and refused."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from llama_tp.checkpoint.export import export
from llama_tp.checkpoint.formats.fairscale import FairscaleReader
from llama_tp.checkpoint.formats.quantized import num_bytes, parameters_of
from llama_tp.checkpoint.formats.quantizing import dense
from llama_tp.checkpoint.inspection import inspect_checkpoint
from llama_tp.checkpoint.store.stored import StoredReader
from llama_tp.model.quantization import dequantize, quantize
from llama_tp.model_args import ModelArgs
from tests.tiny_checkpoint import params_of, write_meta
from tests.tiny_gguf import write_model
from tests.tiny_huggingface import save, tiny_model
from tests.tiny_mistral import write_mistral
from tests.tiny_model import random_model
from tests.tiny_quantized import convert_to, engine_on, outputs_of, outputs_of_transformers, quantize_folder


def write_metas(path):
    args = ModelArgs(dim=192, n_layers=2, n_heads=6, n_kv_heads=2, vocab_size=420, ffn_hidden_dim=224)
    write_meta(path, random_model(args).state_dict(), 2, params=params_of(args))


DENSE_SOURCES = {
    "meta": write_metas,
    "hugging_face": lambda path: save(tiny_model("qwen2, groups"), path),
    "mistral": lambda path: write_mistral(path, tiny_model("llama, groups of 128")),
    "a.gguf": lambda path: write_model(path, tiny_model("qwen3, groups")),
    "widened.gguf": lambda path: write_model(path, tiny_model("llama, groups"), kind="Q5_1"),
}


@pytest.fixture
def hugging_face(tmp_path):
    return save(tiny_model("llama, groups of 128"), tmp_path / "hugging_face")


def blocks_of(folder):
    return {name: one.read(0, 0, one.shape[0]) for name, one in parameters_of(StoredReader(folder)).items()}


@pytest.mark.parametrize("form", ["int8", "int4"])
@pytest.mark.parametrize("source", DENSE_SOURCES)
def test_every_dense_format_is_quantized_to_the_nearest_of_its_weights(tmp_path, source, form):
    DENSE_SOURCES[source](tmp_path / source)
    plain = StoredReader(convert_to(tmp_path / source, tmp_path / "plain"))
    found = StoredReader(convert_to(tmp_path / source, tmp_path / "quantized", quantize=form))
    assert not plain.quantized
    assert found.about["quantized"] == form
    assert len(found.quantized) == 7 * found.args.n_layers + 1
    for module, one in found.quantized.items():
        name = f"{module}.weight" if f"{module}.weight" in plain.tensors else "tok_embeddings.weight"
        expected = quantize(plain.tensors[name].read(0, 0, one.shape[0]), one.form)
        read = one.read(0, 0, one.shape[0])
        assert torch.equal(dequantize(read, torch.float32), dequantize(expected, torch.float32)), module
    logits, greedy = outputs_of(tmp_path / "quantized")
    assert logits.isfinite().all()
    assert all(len(tokens) == 16 for tokens in greedy)


def test_the_bytes_do_not_depend_on_the_number_of_workers(hugging_face, tmp_path):
    folders = [
        convert_to(hugging_face, tmp_path / str(workers), quantize="int4", workers=workers) for workers in (1, 2, 4)
    ]
    files = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders]
    assert len(files[0]) > 4
    assert files[0] == files[1] == files[2]


def test_a_quantized_checkpoint_is_smaller(hugging_face, tmp_path):
    plain = convert_to(hugging_face, tmp_path / "plain", dtype="bfloat16")
    sizes = {"plain": num_bytes(StoredReader(plain))}
    for form in ("int8", "int4"):
        sizes[form] = num_bytes(
            StoredReader(convert_to(hugging_face, tmp_path / form, dtype="bfloat16", quantize=form))
        )
    assert sizes["int4"] < 0.55 * sizes["plain"]
    assert sizes["int4"] < sizes["int8"] < 0.7 * sizes["plain"]


REFUSED = {
    "a number": ({"quantize": 4}, "quantize=4 must be one of int8, int4, none; or left out"),
    "a flag": ({"quantize": True}, "quantize=True must be one of int8, int4, none; or left out"),
    "another form": ({"quantize": "Q4_0"}, "quantize='Q4_0' must be one of int8, int4, none; or left out"),
    "dtype as quantize": ({"quantize": "bfloat16"}, "quantize='bfloat16' must be one of"),
    "quantize as dtype": ({"dtype": "int4"}, "dtype='int4' must be one of bfloat16, float16, float32"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_value_that_is_none_is_refused_with_those_that_are(hugging_face, tmp_path, case):
    options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        convert_to(hugging_face, tmp_path / "converted", **options)
    assert not (tmp_path / "converted").exists()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("llama", "head_dim=16 is not a multiple of 32"),
        ("llama, wide heads", "head_dim=24 is not a multiple of 32"),
        ("qwen3", r"the feed-forward has 3 groups of 32 columns, fewer than n_heads=4"),
    ],
)
def test_a_model_that_cannot_be_quantized_is_refused_with_the_reason(tmp_path, model, message):
    save(tiny_model(model), tmp_path / "source")
    with pytest.raises(ValueError, match=f"this model cannot be quantized: .*{message}"):
        convert_to(tmp_path / "source", tmp_path / "converted", quantize="int8")
    assert not (tmp_path / "converted").exists()


def test_what_is_quantized_already_is_not_quantized_again(tmp_path):
    write_model(tmp_path / "a.gguf", tiny_model("llama, groups"), kind="Q8_0")
    with pytest.raises(ValueError, match="quantize='int4', but 15 layers of the source are quantized: leave it out"):
        convert_to(tmp_path / "a.gguf", tmp_path / "converted", quantize="int4")
    save(tiny_model("llama, groups of 128"), tmp_path / "awq", torch.float16)
    quantize_folder(tmp_path / "awq", "awq", 64)
    with pytest.raises(ValueError, match="quantize='int8', but 14 layers of the source are quantized"):
        convert_to(tmp_path / "awq", tmp_path / "converted", quantize="int8")


def test_weights_that_a_form_cannot_hold_are_refused_by_name(tmp_path):
    model = tiny_model("llama, groups")
    model.model.layers[1].mlp.down_proj.weight[3, 7] = 1e5
    save(model, tmp_path / "source")
    with pytest.raises(ValueError, match=r"^layers.1.feed_forward.w2.weight: row 3 of the weight holds 100000, .*int4"):
        convert_to(tmp_path / "source", tmp_path / "converted", quantize="int4")
    assert not (tmp_path / "converted").exists()
    convert_to(tmp_path / "source", tmp_path / "converted", quantize="int8")


@pytest.mark.parametrize("form", ["int8", "int4"])
@pytest.mark.parametrize("model", ["llama, groups of 128", "qwen2, groups", "qwen3, groups"])
def test_an_export_for_transformers_computes_what_the_quantized_model_computes(tmp_path, model, form):
    save(tiny_model(model), tmp_path / "source")
    folder = convert_to(tmp_path / "source", tmp_path / "quantized", quantize=form)
    export(folder, tmp_path / "hf", format="hf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert theirs.dtype == torch.float32
    (logits, greedy), (expected_logits, expected_greedy) = outputs_of(folder), outputs_of_transformers(theirs)
    torch.testing.assert_close(logits, expected_logits, atol=1e-4, rtol=0)
    assert greedy == expected_greedy


def test_an_export_in_meta_s_format_has_the_dequantized_weights(tmp_path):
    write_metas(tmp_path / "source")
    folder = convert_to(tmp_path / "source", tmp_path / "quantized", quantize="int4")
    export(folder, tmp_path / "meta", format="meta")
    expected, found = dense(StoredReader(folder)), FairscaleReader(tmp_path / "meta")
    assert found.tensors.keys() == expected.tensors.keys()
    for name, one in expected.tensors.items():
        assert torch.equal(found.tensors[name].read(0, 0, one.shape[0]), one.read(0, 0, one.shape[0])), name
    again = convert_to(tmp_path / "meta", tmp_path / "again")
    torch.testing.assert_close(outputs_of(again)[0], outputs_of(folder)[0], atol=1e-4, rtol=0)


def test_plan_and_inspect_agree_with_what_ranks_hold(hugging_face, tmp_path, run):
    for form in ("int8", "int4"):
        folder = convert_to(hugging_face, tmp_path / form, quantize=form)
        run("--version")  # what the conversion printed is gone
        inspected = json.loads(run("inspect", str(folder), "--json")[1])
        assert sum(inspected["quantized"].values()) == 15
        if form == "int4":
            assert "14 linear layers in int4, 1 linear layer in int8_groups" in run("inspect", str(folder))[1]
        before = json.loads(run("plan", str(hugging_face), "--quantize", form, "--json")[1])
        after = json.loads(run("plan", str(folder), "--json")[1])
        assert before["sizes"] == after["sizes"]
        assert before["dtype"] == after["dtype"] == "float32"
        assert [row["ranks"] for row in after["sizes"]] == [1, 2, 3, 4]
        of_size = {row["ranks"]: row["weights"] for row in after["sizes"]}
        assert {row["ranks"]: row["weights"] for row in inspected["memory_per_rank"]} == {
            ranks: of_size[ranks] for ranks in (1, 2, 4)
        }
        assert of_size[1] == num_bytes(StoredReader(folder))
        plain = json.loads(run("plan", str(hugging_face), "--json")[1])
        assert all(
            one["weights"] < 0.6 * two["weights"] for one, two in zip(after["sizes"], plain["sizes"], strict=True)
        )


def test_the_planned_weights_are_those_that_an_engine_holds(hugging_face, tmp_path, run):
    folder = convert_to(hugging_face, tmp_path / "int4", quantize="int4")
    run("--version")
    planned = json.loads(run("plan", str(folder), "--device", "cpu", "--json")[1])["sizes"][0]["weights"]
    model = engine_on(folder, compile=False).runner.model
    linears = sum(one.num_bytes for one in model.modules() if hasattr(one, "num_bytes"))
    norms = 4 * 128 * (2 * inspect_checkpoint(folder).args.n_layers + 1)
    assert planned == linears + model.tok_embeddings.weight.nbytes + norms


def test_plan_refuses_what_convert_refuses(hugging_face, tmp_path, run):
    folder = convert_to(hugging_face, tmp_path / "int4", quantize="int4")
    narrow = save(tiny_model("llama"), tmp_path / "narrow")
    run("--version")
    for argv, words in (
        ((str(hugging_face), "--quantize", "int3"), "quantize='int3' must be one of int8, int4"),
        ((str(folder), "--quantize", "int8"), "quantize='int8', but the model is quantized already; leave it out"),
        (
            (str(narrow), "--quantize", "int8"),
            "head_dim=16 is not a multiple of",
        ),
        ((str(folder / "model_args.json"),), "model_args.json is of a quantized model, without its weights"),
    ):
        code, out, err = run("plan", *argv)
        assert (code, out) == (1, "")
        assert words in err
        assert err.count("\n") == 1
