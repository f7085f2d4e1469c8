"""Quantized checkpoints: every rank of every group computes with its part of exactly the stored numbers."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from llama_tp.checkpoint.convert import convert
from llama_tp.checkpoint.formats.cast import in_one_dtype
from llama_tp.checkpoint.formats.quantized import in_one_format, parameters_of
from llama_tp.checkpoint.formats.quantizing import dense, quantizing
from llama_tp.checkpoint.formats.reader import MemoryReader
from llama_tp.checkpoint.load import load_model
from llama_tp.checkpoint.store import dcp
from llama_tp.checkpoint.store.manifest import write_manifest
from llama_tp.checkpoint.store.reading import StoredFiles
from llama_tp.checkpoint.store.stored import StoredReader
from llama_tp.config import EngineConfig
from llama_tp.engine.memory import MemoryModel
from llama_tp.engine.sampling_params import SamplingParams
from llama_tp.engine.startup import load_engine
from llama_tp.model.linear import Linear
from llama_tp.model.norm import Norm
from llama_tp.model.quantization import dequantize, quantize
from llama_tp.model.weights import weight_shapes
from llama_tp.model_args import ModelArgs
from llama_tp.parallel.launch import join
from llama_tp.parallel.local_modules import RowLinear
from llama_tp.parallel.sharding import num_ranks, shard, tp_dim
from tests.tiny_huggingface import save as save_hugging_face
from tests.tiny_huggingface import tiny_model
from tests.tiny_model import random_model
from tests.tiny_text import make_tokenizer_json

MODELS = {
    "grouped": ModelArgs(
        dim=96, n_layers=2, n_heads=6, n_kv_heads=2, vocab_size=131, ffn_hidden_dim=224, attention_head_dim=32
    ),
    "heads that no number divides": ModelArgs(
        dim=64, n_layers=1, n_heads=7, n_kv_heads=7, vocab_size=99, ffn_hidden_dim=320, attention_head_dim=32
    ),
    "tied, biases": ModelArgs(
        dim=64,
        n_layers=1,
        n_heads=4,
        n_kv_heads=2,
        vocab_size=64,
        ffn_hidden_dim=160,
        attention_head_dim=32,
        tied_embeddings=True,
        qkv_bias=True,
        wo_bias=True,
        ffn_bias=True,
    ),
}


def reader_of(args, form):
    """A quantized model in memory."""
    model = random_model(args)
    tensors = {name: weight.detach() for name, weight in model.named_parameters()}
    return quantizing(MemoryReader.of(args, {name: tensors[name] for name in weight_shapes(args)}), form)


def save(reader, folder):
    folder.mkdir(exist_ok=True)
    write_manifest(folder, known=dcp.save(reader, folder), about=reader.about)
    reader.args.save(folder / "model_args.json")
    write_manifest(folder, about=reader.about)
    return folder


@pytest.fixture(scope="module", params=[(name, form) for name in MODELS for form in ("int8", "int4")], ids=str)
def pair(request, tmp_path_factory):
    """(quantized checkpoint, the same numbers as a dense one in float32, architecture)."""
    name, form = request.param
    reader = reader_of(MODELS[name], form)
    folder = tmp_path_factory.mktemp("pair")
    save(reader, folder / "quantized")
    save(dense(reader, torch.float32), folder / "dense")
    return folder / "quantized", folder / "dense", reader.args


def load(folder, args, ranks=1, rank=0, dtype=torch.float32):
    """One rank's model, without its group."""
    comm = SimpleNamespace(size=num_ranks(ranks), rank=rank, is_leader=rank == 0)
    group = SimpleNamespace(comm=comm, mesh=None, device=torch.device("cpu"))
    return load_model(str(folder), args, group, dtype, ranks=ranks)


def linears(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, Linear)}


def test_every_rank_of_every_group_holds_its_part_of_the_stored_numbers(pair):
    quantized, plain, args = pair
    for size in range(1, args.n_heads + 1):
        for rank in range(size):
            ours, theirs = linears(load(quantized, args, size, rank)), linears(load(plain, args, size, rank))
            assert ours.keys() == theirs.keys()
            for name, linear in ours.items():
                assert torch.equal(linear.dense_weight(), theirs[name].dense_weight()), (size, rank, name)


def test_ranks_with_unequal_shares_hold_their_parts_too(pair):
    quantized, plain, args = pair
    shares = (args.n_heads - 2, 1, 1)
    for rank in range(3):
        ours, theirs = linears(load(quantized, args, shares, rank)), linears(load(plain, args, shares, rank))
        for name, linear in ours.items():
            assert torch.equal(linear.dense_weight(), theirs[name].dense_weight()), (rank, name)


def test_what_a_rank_holds_is_what_the_memory_model_says(pair):
    quantized, _, args = pair
    formats = StoredFiles(quantized).formats
    for size in range(1, args.n_heads + 1):
        for rank in range(size):
            model = load(quantized, args, size, rank, torch.bfloat16)
            held = sum(linear.num_bytes for linear in linears(model).values()) + model.tok_embeddings.weight.nbytes
            norms = sum(isinstance(module, Norm) for module in model.modules())
            rows = [module for module in model.modules() if isinstance(module, RowLinear)]
            held += 2 * norms * args.dim + sum(row.bias.nbytes for row in rows if row.bias is not None)
            said = MemoryModel.of(args, EngineConfig(), size, rank, "bfloat16", "cpu", formats)
            assert said.weights == held, (size, rank)


def test_weights_that_were_widened_are_not_kept_alive(pair):
    """By a norm, for example, that would lie in the same memory."""
    quantized, _, args = pair
    model = load(quantized, args)
    for norm in (module for module in model.modules() if isinstance(module, Norm)):
        assert norm.weight.untyped_storage().nbytes() <= norm.weight.nbytes + 64


def test_each_rank_reads_whole_chunks_of_its_own_only(pair):
    quantized, _, args = pair
    for name, tensor in StoredFiles(quantized).tensors.items():
        if (dim := tp_dim(name)) is None:
            assert len(tensor.chunks) == 1
            continue
        edges = {chunk.start for chunk in tensor.chunks} | {tensor.shape[dim]}
        for size in range(1, args.n_heads + 1):
            for rank in range(size):
                for _, entries in shard(args, name, size, rank, tensor.shape[dim]).parts:
                    assert {entries.start, entries.stop} <= edges, (name, size, rank)


def test_greedy_tokens_and_logits_are_those_of_the_dequantized_model(pair):
    quantized, plain, args = pair
    outputs = []
    for folder in (quantized, plain):
        engine = load_engine(
            str(folder), args, EngineConfig(device="cpu", dtype="float32", max_seq_len=64), join("cpu")
        )
        params = SamplingParams(temperature=0.0, max_new_tokens=12)
        outputs.append(engine.generate([[1, 5, 9, 2]], params)[0])
    assert outputs[0].token_ids == outputs[1].token_ids


def test_a_quantized_checkpoint_reads_back_as_it_was_written(pair, tmp_path):
    quantized, _, _ = pair
    reader = StoredReader(quantized)
    again = StoredReader(save(reader, tmp_path / "again"))
    one, two = parameters_of(reader), parameters_of(again)
    assert one.keys() == two.keys()
    for name, source in one.items():
        assert torch.equal(source.read(0, 0, source.shape[0]), two[name].read(0, 0, source.shape[0])), name
    for module, source in reader.quantized.items():
        columns = source.shape[1] - 32
        whole = dequantize(source.read(0, 0, source.shape[0]), torch.float32)
        part = dequantize(source.read(1, 32, columns), torch.float32)
        assert torch.equal(part, whole[:, 32:]), module


@pytest.mark.parametrize(("quantize_to", "forms"), [("int8", {"int8": 15}), ("int4", {"int4": 14, "int8_groups": 1})])
def test_convert_quantizes_the_linear_layers_and_keeps_the_rest(tmp_path, quantize_to, forms):
    originals = tmp_path / "originals"
    save_hugging_face(tiny_model("llama, groups"), originals)
    make_tokenizer_json(originals)
    for name, options in (("quantized", {"quantize": quantize_to}), ("plain", {})):
        convert(
            str(originals),
            save_checkpoint_dir=str(tmp_path / name),
            model_args_path=str(tmp_path / "a.json"),
            **options,
        )
    quantized, plain = StoredReader(tmp_path / "quantized"), StoredReader(tmp_path / "plain")
    assert Counter(source.form for source in quantized.quantized.values()) == forms
    assert quantized.about["quantized_layers"] == forms
    for name, source in quantized.tensors.items():
        assert torch.equal(source.read(0, 0, source.shape[0]), plain.tensors[name].read(0, 0, source.shape[0])), name
    for module, source in quantized.quantized.items():
        weight = plain.tensors[f"{module}.weight"].read(0, 0, source.shape[0])
        expected = dequantize(quantize(weight, source.form), torch.float32)
        assert torch.equal(dequantize(source.read(0, 0, source.shape[0]), torch.float32), expected), module


def test_models_whose_sizes_do_not_allow_groups_are_refused_by_name():
    args = ModelArgs(dim=64, n_layers=1, n_heads=4, n_kv_heads=4, vocab_size=64, ffn_hidden_dim=96)
    with pytest.raises(ValueError, match="head_dim=16 is not a multiple of 32"):
        reader_of(args, "int4")


def test_layers_are_not_quantized_twice():
    reader = reader_of(MODELS["grouped"], "int4")
    with pytest.raises(ValueError, match="15 layers of the source are quantized: leave it out"):
        quantizing(reader, "int8")
    assert in_one_dtype(reader, torch.bfloat16).quantized is reader.quantized


def test_layers_that_are_computed_as_one_are_quantized_together_or_not_at_all():
    found = dict(reader_of(MODELS["grouped"], "int4").quantized)
    del found["layers.0.attention.wv"]
    kept = in_one_format(found)
    assert found.keys() - kept.keys() == {"layers.0.attention.wq", "layers.0.attention.wk"}
