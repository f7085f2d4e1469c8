"""The way back: what was converted comes out of `export` as it went in, and others' code computes the same with it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from llama_tp.checkpoint import export as export_module
from llama_tp.checkpoint.convert import convert
from llama_tp.checkpoint.export import export
from llama_tp.checkpoint.formats import huggingface_writer
from llama_tp.checkpoint.formats import reader as reader_module
from llama_tp.checkpoint.formats.fairscale import FairscaleReader
from llama_tp.checkpoint.formats.fairscale_writer import meta_params
from llama_tp.checkpoint.formats.huggingface import HuggingFaceReader
from llama_tp.checkpoint.formats.huggingface_writer import hugging_face_config
from llama_tp.checkpoint.formats.open import open_checkpoint
from llama_tp.checkpoint.formats.reader import MemoryReader
from llama_tp.checkpoint.store import dcp, load_verification
from llama_tp.checkpoint.store import verify as verify_module
from llama_tp.checkpoint.store.hashing_file import HashingFile
from llama_tp.checkpoint.store.manifest import write_manifest
from llama_tp.checkpoint.store.staging import StagedFolder
from llama_tp.checkpoint.store.stored import MODEL_ARGS, StoredReader
from llama_tp.checkpoint.store.verify import verify
from llama_tp.config import EngineConfig
from llama_tp.engine.sampling_params import SamplingParams
from llama_tp.engine.step import Chunk, StepPlan
from llama_tp.model.weights import weight_shapes
from llama_tp.model_args import ModelArgs, RopeScaling
from llama_tp.text import load_tokenizer
from tests.paths import names_in
from tests.published_params import LLAMA_2_7B, LLAMA_3_1_8B
from tests.tiny_checkpoint import ARGS, flip_bit, meta_tensors, split_as_meta, write_meta
from tests.tiny_converted import convert_beside, write_originals
from tests.tiny_huggingface import CONFIGS, save, tiny_model
from tests.tiny_model import MODELS, VARIANTS, engine_of, random_model, runner_of, transformers_twin
from tests.tiny_text import make_sentencepiece_model, make_tokenizer_json

ALL = {**MODELS, **VARIANTS}
TOLERANCE = 1e-4
IN_META_S_FORMAT = ["mha", "gqa", "tied", "multiplier"]


def store(folder, args, tensors):
    """A converted checkpoint of tensors in memory, without a tokenizer."""
    folder.mkdir()
    reader = MemoryReader.of(args, tensors)
    files = dcp.save(reader, folder)
    args.save(folder / MODEL_ARGS)
    write_manifest(folder, known=files, about=reader.about)
    return folder


def store_again(source, folder):
    """What `convert` makes of it, without a tokenizer."""
    reader = open_checkpoint(source)
    folder.mkdir()
    files = dcp.save(reader, folder)
    reader.args.save(folder / MODEL_ARGS)
    write_manifest(folder, known=files, about=reader.about)
    return folder


def values_of(reader):
    return {name: source.read(0, 0, source.shape[0]) for name, source in reader.tensors.items()}


def weights_of(model):
    state = model.state_dict()
    return {name: state[name].clone() for name in weight_shapes(model.args)}


def as_computed(args):
    """The architecture, however its sizes are given."""
    own = {"ffn_hidden_dim": args.hidden_dim, "attention_head_dim": args.head_dim, "multiple_of": 1, "max_seq_len": 1}
    return replace(args, ffn_dim_multiplier=None, max_batch_size=1, **own)


def assert_same(one, two):
    assert as_computed(one.args) == as_computed(two.args)
    assert one.dtype == two.dtype
    expected, found = values_of(one), values_of(two)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.fixture(params=ALL)
def stored(request, tmp_path):
    """(the model, its converted checkpoint) for all kinds."""
    model = random_model(ALL[request.param])
    return model, store(tmp_path / "stored", model.args, weights_of(model))


def test_a_hugging_face_export_computes_in_transformers_what_we_compute(stored, tmp_path):
    model, folder = stored
    export(folder, tmp_path / "hf", format="hf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert theirs.dtype == torch.float32
    prompt = torch.randint(0, model.args.vocab_size, (24,), generator=torch.Generator().manual_seed(1)).tolist()
    expected = theirs(torch.tensor([prompt])).logits[0]
    runner = runner_of(model, EngineConfig(max_seq_len=128, max_batch_size=4))
    for position, token in enumerate(prompt):
        pages = () if position else ((0, 0, 0), (0, 1, 1))
        logits = runner.execute(StepPlan(position + 1, (Chunk(0, position, (token,), 1),), pages))
        torch.testing.assert_close(logits[0], expected[position], atol=TOLERANCE, rtol=0)
    engine = engine_of(model)
    completion = engine.generate([prompt], SamplingParams(max_new_tokens=20, temperature=0))[0]
    ids = torch.tensor([prompt])
    greedy = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
    assert completion.token_ids == greedy[0, 24:].tolist()


def test_what_is_exported_for_transformers_comes_back_bit_by_bit(stored, tmp_path):
    _, folder = stored
    export(folder, tmp_path / "hf", format="hf")
    assert_same(StoredReader(folder), HuggingFaceReader(tmp_path / "hf"))
    again = store_again(tmp_path / "hf", tmp_path / "again")
    assert_same(StoredReader(folder), StoredReader(again))


@pytest.mark.parametrize("name", IN_META_S_FORMAT)
def test_what_is_exported_for_meta_s_code_comes_back_bit_by_bit_at_every_number_of_shards(tmp_path, name):
    args = ALL[name]
    folder = store(tmp_path / "stored", args, weights_of(random_model(args)))
    sizes = [m for m in (1, 2, 4) if not any(n % m for n in (args.n_kv_heads, args.hidden_dim, args.vocab_size))]
    assert 1 in sizes
    for size in sizes:
        destination = tmp_path / f"meta{size}"
        export(folder, destination, format="meta", model_parallel_size=size)
        assert_same(StoredReader(folder), FairscaleReader(destination, size))
        assert_same(StoredReader(folder), StoredReader(store_again(destination, tmp_path / f"again{size}")))


@pytest.mark.parametrize("before", [1, 2, 4])
@pytest.mark.parametrize("shards", [1, 2, 4])
def test_the_shards_are_those_that_meta_s_code_would_load(tmp_path, shards, before):
    """As torch.chunk cuts them; the embedding as Llama 2's code has it, because the vocabulary is sentencepiece."""
    folder = convert_beside(write_originals(tmp_path / "originals", num_shards=before))
    export(folder, tmp_path / "meta", format="meta", model_parallel_size=shards)
    for rank, expected in enumerate(split_as_meta(meta_tensors(), shards, embedding_dim=1)):
        path = tmp_path / "meta" / f"consolidated.{rank:02d}.pth"
        found = torch.load(path, weights_only=True)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())
        # A view would have taken its whole storage along.
        assert path.stat().st_size < sum(piece.nbytes for piece in expected.values()) + 400 * len(expected)
    vocabulary = tmp_path / "meta" / "tokenizer.model"
    assert vocabulary.read_bytes() == (tmp_path / "originals" / "tokenizer.model").read_bytes()
    done = subprocess.run(["md5sum", "--check", "--strict", "checklist.chk"], cwd=tmp_path / "meta", check=True)
    assert done.returncode == 0
    assert len((tmp_path / "meta" / "checklist.chk").read_text().splitlines()) == shards + 2
    convert(
        str(tmp_path / "meta"),
        str(tmp_path / "meta"),
        shards,
        str(tmp_path / "again"),
        model_args_path=str(tmp_path / "a.json"),
    )
    assert_same(StoredReader(folder), StoredReader(tmp_path / "again"))


def test_as_many_shards_are_written_as_there_were_unless_one_says_how_many(tmp_path):
    folder = convert_beside(write_originals(tmp_path / "originals", num_shards=2))
    export(folder, tmp_path / "meta", format="meta")
    assert len(FairscaleReader(tmp_path / "meta").files) == 2


def test_tied_embeddings_are_one_tensor_under_two_names_in_meta_s_format(tmp_path):
    """Meta's code has an output of its own, and would be left with a random one."""
    args = replace(MODELS["tied"], n_kv_heads=2, vocab_size=98)
    folder = store(tmp_path / "stored", args, weights_of(random_model(args)))
    export(folder, tmp_path / "meta", format="meta", model_parallel_size=2)
    for path in FairscaleReader(tmp_path / "meta").files:
        shard = torch.load(path, weights_only=True)
        assert shard["output.weight"].data_ptr() == shard["tok_embeddings.weight"].data_ptr()
        assert shard["output.weight"].shape == (49, 64)
    assert FairscaleReader(tmp_path / "meta").args.tied_embeddings
    assert_same(StoredReader(folder), FairscaleReader(tmp_path / "meta"))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_hugging_face_model_comes_back_bit_by_bit(tmp_path, name):
    original = save(tiny_model(name), tmp_path / "original", torch.bfloat16)
    folder = store_again(original, tmp_path / "stored")
    export(folder, tmp_path / "hf", format="hf")
    assert_same(HuggingFaceReader(original), HuggingFaceReader(tmp_path / "hf"))
    assert_same(StoredReader(folder), StoredReader(store_again(tmp_path / "hf", tmp_path / "again")))
    theirs, ours = (load_of(path) for path in (original, tmp_path / "hf"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def load_of(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("name", ["llama", "llama, grouped", "llama, tied", "mistral"])
def test_a_plain_hugging_face_model_becomes_one_of_meta_s_and_back(tmp_path, name):
    """Of a feed-forward size that Meta's rule has to be bent for."""
    folder = store_again(save(tiny_model(name), tmp_path / "original"), tmp_path / "stored")
    export(folder, tmp_path / "meta", format="meta", model_parallel_size=2)
    again = store_again(tmp_path / "meta", tmp_path / "again")
    export(again, tmp_path / "hf", format="hf")
    assert_same(HuggingFaceReader(tmp_path / "original"), HuggingFaceReader(tmp_path / "hf"))


@pytest.mark.parametrize("name", ["llama, biases", "qwen3, biases"])
def test_large_models_are_several_files_with_an_index_read_in_blocks(tmp_path, monkeypatch, name):
    original = save(tiny_model(name), tmp_path / "original")
    folder = store_again(original, tmp_path / "stored")
    monkeypatch.setattr(huggingface_writer, "MAX_FILE_BYTES", 60_000)
    monkeypatch.setattr(reader_module, "BLOCK_BYTES", 5_000)
    export(folder, tmp_path / "hf", format="hf")
    files = sorted(path.name for path in (tmp_path / "hf").glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    embedding = 416 * 64 * 4  # alone in its file
    assert sum(path.stat().st_size > 62_000 for path in (tmp_path / "hf").glob("*.safetensors")) == 2
    assert (tmp_path / "hf" / files[0]).stat().st_size < embedding + 500
    loaded = {key: value for file in files for key, value in load_file(tmp_path / "hf" / file).items()}
    theirs = load_of(original)
    assert loaded.keys() == theirs.keys()
    assert all(torch.equal(loaded[key], value) for key, value in theirs.items())
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == theirs.keys()
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in theirs.values())
    state = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").state_dict()
    assert all(torch.equal(state[key], value) for key, value in theirs.items())


def test_the_tokenizer_comes_along_and_says_where_answers_end(tmp_path):
    write_meta(tmp_path / "originals", meta_tensors())
    make_tokenizer_json(tmp_path / "originals")
    stop = load_tokenizer(tmp_path / "originals").eos_id
    (tmp_path / "originals" / "generation_config.json").write_text(json.dumps({"eos_token_id": [stop, 7]}))
    source, folder = str(tmp_path / "originals"), tmp_path / "converted"
    convert(source, source, None, str(folder), model_args_path=str(folder / MODEL_ARGS))
    (folder / "added_tokens.json").write_text('{"of someone else": 3}')
    export(folder, tmp_path / "hf", format="hf")
    assert names_in(tmp_path / "hf") == [
        "config.json",
        "generation_config.json",
        "manifest.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["eos_token_id"] == sorted(load_tokenizer(tmp_path / "originals").stop_ids)
    assert {stop, 7} <= set(config["eos_token_id"])
    verify(tmp_path / "hf")


@pytest.mark.parametrize("name", sorted(ALL.keys() - set(IN_META_S_FORMAT)))
def test_what_meta_s_code_would_compute_otherwise_is_refused_by_name(tmp_path, name):
    words = {
        "attention bias": "qkv_bias=true: Meta's code",
        "biases everywhere": "qkv_bias=true, wo_bias=true, ffn_bias=true: ",
        "head norms, wide heads": r"qk_norm=true, a head size of 32 \(not dim / n_heads\)",
        "linear rope scaling, narrow heads": "a head size of 6 .*, rope_scaling of kind linear with 2.5",
        "rope scaling": "rope_scaling of kind llama3 with 4, 1, 4, 64",
    }
    args = ALL[name]
    folder = store(tmp_path / "stored", args, weights_of(random_model(args)))
    with pytest.raises(ValueError, match=words[name]) as error:
        export(folder, tmp_path / "meta", format="meta")
    assert "\n" not in str(error.value)
    assert names_in(tmp_path) == ["stored"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"format": "gguf"}, "format='gguf' must be one of meta, hf"),
        ({"format": "meta", "model_parallel_size": 3}, "model_parallel_size=3 does not divide n_heads=8; .*: 1, 2, 4$"),
        ({"format": "meta", "model_parallel_size": 8}, "model_parallel_size=8 does not divide n_kv_heads=4; legal"),
        ({"format": "meta", "model_parallel_size": 0}, "model_parallel_size=0 is out of range; legal"),
        ({"format": "meta", "model_parallel_size": "two"}, "model_parallel_size='two' must be an integer"),
        ({"format": "hf", "model_parallel_size": 2}, "model_parallel_size=2 is for --format meta only"),
    ],
)
def test_a_wrong_argument_is_one_line_and_nothing_is_written(tmp_path, options, words):
    folder = store(tmp_path / "stored", ARGS, meta_tensors())
    with pytest.raises(ValueError, match=words) as error:
        export(folder, tmp_path / "out", **options)
    assert "\n" not in str(error.value)
    assert names_in(tmp_path) == ["stored"]


def test_a_limit_of_the_context_is_kept_for_transformers_and_refused_for_meta(tmp_path):
    args = replace(ARGS, context_limit=72, max_seq_len=72)
    folder = store(tmp_path / "stored", args, meta_tensors())
    with pytest.raises(ValueError, match="context_limit=72"):
        export(folder, tmp_path / "meta", format="meta")
    export(folder, tmp_path / "hf", format="hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["architectures"] == ["MistralForCausalLM"]
    assert HuggingFaceReader(tmp_path / "hf").args.context_limit == 72


def test_a_limit_that_no_window_can_express_becomes_frequencies_that_begin_to_change_there(tmp_path):
    """Only Llama has a biased feed-forward, and Llama has no window."""
    args = replace(ARGS, ffn_bias=True, context_limit=72, max_seq_len=72)
    model = random_model(args)
    export(store(tmp_path / "stored", args, weights_of(model)), tmp_path / "hf", format="hf")
    assert as_computed(HuggingFaceReader(tmp_path / "hf").args) == as_computed(args)
    prompt = torch.arange(60).unsqueeze(0)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    twin = transformers_twin(random_model(replace(args, context_limit=None)))
    torch.testing.assert_close(theirs(prompt).logits, twin(prompt).logits, atol=TOLERANCE, rtol=0)


def test_a_model_that_is_none_of_transformers_is_refused_by_its_features():
    for features in ({"wo_bias": True}, {"qk_norm": True, "ffn_bias": True}, {"qkv_bias": True, "ffn_bias": True}):
        args = replace(ARGS, **features)
        with pytest.raises(ValueError, match=f"no Llama-like model with .*{next(iter(features))}=true"):
            hugging_face_config(args, "float32", None)
    biased = replace(ARGS, ffn_bias=True, context_limit=2048, rope_scaling=RopeScaling(kind="linear", factor=2.0))
    with pytest.raises(ValueError, match="rope_scaling and context_limit=2048"):
        hugging_face_config(biased, "float32", None)


@pytest.mark.parametrize(("published", "rows"), [(LLAMA_2_7B, 32000), (LLAMA_3_1_8B, 128256)])
def test_params_json_says_what_meta_s_own_says(published, rows):
    published = json.loads(published)
    args = ModelArgs.from_params({**published, "vocab_size": rows})
    assert meta_params(args) == {**published, "vocab_size": rows}
    as_of_hugging_face = replace(args, ffn_hidden_dim=args.hidden_dim, ffn_dim_multiplier=None, multiple_of=256)
    assert ModelArgs.from_params(meta_params(as_of_hugging_face)).hidden_dim == args.hidden_dim


@pytest.mark.parametrize("hidden", [1, 7, 96, 1000, 1536, 8960, 13824, 18944, 28672, 53248])
def test_every_feed_forward_size_has_a_rule_of_meta_s(hidden):
    for dim in (64, 576, 4096, 8192):
        args = ModelArgs(dim=dim, n_layers=1, n_heads=1, n_kv_heads=1, vocab_size=8, ffn_hidden_dim=hidden)
        assert ModelArgs.from_params(meta_params(args)).hidden_dim == hidden


def test_the_checkpoint_itself_and_what_is_not_ours_are_not_overwritten(tmp_path):
    folder = store(tmp_path / "stored", ARGS, meta_tensors())
    for destination in (folder, folder / "inside", tmp_path):
        with pytest.raises(ValueError, match="are in each other"):
            export(folder, destination, format="hf", overwrite=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary").touch()
    with pytest.raises(ValueError, match="has no manifest"):
        export(folder, tmp_path / "mine", format="hf", overwrite=True)
    export(folder, tmp_path / "out", format="hf")
    with pytest.raises(ValueError, match="pass --overwrite"):
        export(folder, tmp_path / "out", format="meta")
    export(folder, tmp_path / "out", format="meta", overwrite=True)
    assert "model.safetensors" not in names_in(tmp_path / "out")
    verify(folder)


@pytest.mark.parametrize("kind", ["meta", "hf"])
def test_a_damaged_checkpoint_is_not_exported(tmp_path, monkeypatch, kind):
    folder = store(tmp_path / "stored", ARGS, meta_tensors())
    for module in (load_verification, verify_module):
        monkeypatch.setattr(module, "SMALL", 5000)  # as if it were large, and hashed only while it is read
    flip_bit(folder / "__0_0.distcp", 100_000)
    with pytest.raises(ValueError, match=r"__0_0\.distcp is corrupt: its sha256"):
        export(folder, tmp_path / "out", format=kind)
    assert names_in(tmp_path) == ["stored"]


def killed_at(target, name, *, after, function):
    """Run a function in a child that is killed at, or right after, its first call of a method."""
    child = os.fork()
    if child == 0:
        original = getattr(target, name)

        def killed(*args, **kwargs):
            if after:
                original(*args, **kwargs)
            os.kill(os.getpid(), signal.SIGKILL)

        setattr(target, name, killed)
        try:
            function()
        finally:
            os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


@pytest.mark.parametrize("kind", ["meta", "hf"])
@pytest.mark.parametrize(
    ("target", "name", "after"),
    [
        (HashingFile, "_write", True),
        (export_module, "write_manifest", False),
        (StagedFolder, "commit", False),
        (StagedFolder, "commit", True),
    ],
)
def test_killed_at_any_point_the_destination_is_absent_or_whole_and_a_rerun_succeeds(
    tmp_path, kind, target, name, after
):
    folder = store(tmp_path / "stored", ARGS, meta_tensors())
    killed_at(target, name, after=after, function=lambda: export(folder, tmp_path / "out", format=kind))
    is_whole = (target, after) == (StagedFolder, True)
    assert (tmp_path / "out").exists() == is_whole
    export(folder, tmp_path / "out", format=kind, overwrite=is_whole)
    verify(tmp_path / "out")
    assert_same(StoredReader(folder), open_checkpoint(tmp_path / "out"))
    assert names_in(tmp_path) == ["out", "stored"]


def test_one_that_is_told_to_end_leaves_nothing(tmp_path):
    folder = store(tmp_path / "stored", ARGS, meta_tensors())
    program = f"""
import os, signal
from llama_tp.checkpoint.store.hashing_file import HashingFile
from llama_tp.cli.command import run_command
from llama_tp.checkpoint.export import export
HashingFile.write = lambda *_: os.kill(os.getpid(), signal.SIGTERM)
run_command(lambda: export({str(folder)!r}, {str(tmp_path / "out")!r}, format="hf"))
"""
    done = subprocess.run([sys.executable, "-c", program], check=False)
    assert done.returncode == 143
    assert names_in(tmp_path) == ["stored"]


def test_a_sentencepiece_vocabulary_is_enough_for_transformers(tmp_path):
    """What Meta ships for Llama 2 has none of Hugging Face's files."""
    folder = convert_beside(write_originals(tmp_path / "originals"))
    export(folder, tmp_path / "hf", format="hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["torch_dtype"]) == (1, 2, "bfloat16")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf").dtype == torch.bfloat16
    (tmp_path / "spm").mkdir()
    assert (tmp_path / "hf" / "tokenizer.model").read_bytes() == make_sentencepiece_model(tmp_path / "spm").read_bytes()
