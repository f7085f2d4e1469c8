"""Models as transformers saves them compute what transformers computes; unsound ones are refused in one line."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from llama_tp.checkpoint.convert import MODEL_ARGS, convert
from llama_tp.checkpoint.formats.fairscale import FairscaleReader
from llama_tp.checkpoint.formats.huggingface import HuggingFaceReader, hugging_face_name
from llama_tp.checkpoint.formats.open import open_checkpoint
from llama_tp.checkpoint.formats.reader import MemoryTensor
from llama_tp.checkpoint.formats.rotary import RotaryTensor
from llama_tp.config import EngineConfig
from llama_tp.config_error import ConfigError
from llama_tp.engine.sampling_params import SamplingParams
from llama_tp.engine.startup import load_engine
from llama_tp.engine.step import Chunk, StepPlan
from llama_tp.model_args import ModelArgs, RopeScaling
from llama_tp.parallel.comm import SingleComm
from llama_tp.parallel.launch import Group
from llama_tp.text import load_tokenizer
from tests.tiny_checkpoint import meta_tensors, write_meta
from tests.tiny_huggingface import CONFIGS, WINDOW, edit_config, save, tiny_model
from tests.tiny_text import make_tokenizer_json

TOLERANCE = 1e-4  # float32, absolute
CONTEXT = 72
ALONE = Group(comm=SingleComm(), device=torch.device("cpu"), mesh=None)


def converted(source, folder, **options):
    """The folder of the conversion."""
    options = {"max_seq_len": CONTEXT, "max_batch_size": 4, **options}
    convert(str(source), str(source), None, str(folder), model_args_path=str(folder / MODEL_ARGS), **options)
    return folder


def engine_of(folder, **config):
    args = ModelArgs.load_converted(folder / MODEL_ARGS)
    config = {"max_seq_len": args.max_seq_len, "max_batch_size": 4, "device": "cpu", **config}
    return load_engine(str(folder), args, EngineConfig(**config), ALONE)


@pytest.fixture(params=CONFIGS, scope="module")
def pair(request, tmp_path_factory):
    """(transformers' model, our converted checkpoint of it)."""
    folder = tmp_path_factory.mktemp("pair")
    model = tiny_model(request.param)
    save(model, folder / "original")
    make_tokenizer_json(folder / "original")
    return model, converted(folder / "original", folder / "converted")


def tokens_of(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 416, (count,), generator=generator).tolist()


def test_logits_are_those_of_transformers(pair):
    model, folder = pair
    runner = engine_of(folder).runner
    tokens = tokens_of(CONTEXT, seed=1)
    expected = model(torch.tensor([tokens])).logits[0]
    start = 0
    for number, size in enumerate((40, 1, 1, 29, 1)):
        chunk = Chunk(0, start, tuple(tokens[start : start + size]), 1)
        pages = tuple((0, index, index) for index in range(5)) if number == 0 else ()
        logits = runner.execute(StepPlan(number + 1, (chunk,), pages))
        start += size
        torch.testing.assert_close(logits[0], expected[start - 1], atol=TOLERANCE, rtol=0)
    assert start == CONTEXT


def test_greedy_tokens_are_those_of_transformers(pair):
    model, folder = pair
    prompts = [tokens_of(count, seed=count) for count in (3, 40, 1, 25)]
    completions = engine_of(folder).generate(prompts, SamplingParams(max_new_tokens=20, temperature=0))
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = torch.tensor([prompt])
        expected = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False, eos_token_id=None
        )
        assert completion.token_ids == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", ["llama, tied", "llama, biases", "qwen3"])
def test_shards_with_an_index_are_read_as_one_file_is(tmp_path, name):
    model = tiny_model(name)
    one = HuggingFaceReader(save(model, tmp_path / "one"))
    several = HuggingFaceReader(save(model, tmp_path / "several", max_shard_size="50KB"))
    assert len(several.files) > 3
    assert several.args == one.args
    assert several.tensors.keys() == one.tensors.keys()
    for tensor_name, source in one.tensors.items():
        rows = source.shape[0]
        assert torch.equal(several.tensors[tensor_name].read(0, 0, rows), source.read(0, 0, rows)), tensor_name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_type_is_that_of_the_files(tmp_path, dtype):
    reader = HuggingFaceReader(save(tiny_model("qwen2"), tmp_path, dtype))
    assert reader.dtype == dtype
    assert all(source.dtype == source.read(0, 0, 1).dtype == dtype for source in reader.tensors.values())


@pytest.mark.parametrize("name", ["llama, biases", "qwen3, biases"])
def test_every_slice_is_that_of_the_full_tensor_in_meta_s_order(tmp_path, name):
    """Also where it begins and ends inside of a head. Meta's order, from its definition: what transformers stores as
    two halves is pairs of neighbours."""
    model = tiny_model(name)
    reader = HuggingFaceReader(save(model, tmp_path))
    theirs = model.state_dict()
    d = reader.args.head_dim
    for ours, source in reader.tensors.items():
        full = theirs[hugging_face_name(ours)]
        if ours.split(".")[-2] in ("wq", "wk", "q_norm", "k_norm"):
            halves = full.unflatten(0, (-1, 2, d // 2))
            full = torch.stack((halves[:, 0], halves[:, 1]), dim=2).flatten(0, 2)
        assert source.shape == tuple(full.shape)
        for dim, size in enumerate(full.shape):
            for start, length in ((0, size), (1, 1), (size - 1, 1), (size // 2 - 1, 5), (3, size - 4), (5, d)):
                length = min(length, size - start)
                assert torch.equal(source.read(dim, start, length), full.narrow(dim, start, length)), (ours, dim, start)


def test_a_read_of_rotated_rows_holds_the_heads_that_it_touches_and_no_others():
    reads = []

    class Recorded(MemoryTensor):
        def read(self, *what):
            reads.append(what)
            return MemoryTensor.read(self, *what)

    stored = Recorded(torch.arange(64))
    assert RotaryTensor(stored, 8).read(0, 15, 10).tolist() == [15, 16, 20, 17, 21, 18, 22, 19, 23, 24]
    assert reads == [(0, 8, 24)]


def test_the_architecture_comes_from_config_json(tmp_path):
    assert HuggingFaceReader(save(tiny_model("llama 3.1"), tmp_path / "a")).args == ModelArgs(
        dim=64,
        n_layers=2,
        n_heads=4,
        n_kv_heads=1,
        vocab_size=416,
        ffn_hidden_dim=96,
        norm_eps=1e-6,
        rope_theta=5000.0,
        rope_scaling=RopeScaling(factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=64),
    )
    qwen3 = HuggingFaceReader(save(tiny_model("qwen3, biases"), tmp_path / "b"))
    assert qwen3.args.qk_norm
    assert qwen3.args.qkv_bias
    assert qwen3.args.wo_bias
    assert not qwen3.args.ffn_bias
    assert qwen3.args.attention_head_dim is None  # 16 is 64 / 4
    assert qwen3.about == {"source": "huggingface", "architecture": "Qwen3ForCausalLM"}
    assert qwen3.files == [tmp_path / "b" / "model.safetensors"]
    assert qwen3.expected_md5s == {}


OLD = {
    "linear": ("llama, linear", {"rope_scaling": {"type": "linear", "factor": 2.5}}),
    "llama3": (
        "llama 3.1",
        {
            "rope_theta": 5000.0,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "none": ("qwen2", {"rope_theta": 10000.0, "rope_scaling": None}),
    "nothing at all": ("llama", {}),
    "dynamic": ("llama, dynamic", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}),
    "windows without layer types": ("qwen2, window", {"rope_theta": 10000.0, "layer_types": None}),
    "no head size": ("llama, grouped", {"head_dim": None}),
}


@pytest.mark.parametrize("case", OLD)
def test_a_config_json_of_transformers_4_says_the_same(tmp_path, case):
    name, keys = OLD[case]
    save(tiny_model(name), tmp_path)
    expected = HuggingFaceReader(tmp_path).args
    edit_config(tmp_path, rope_parameters=None, **keys)
    assert HuggingFaceReader(tmp_path).args == expected


def test_frequencies_that_old_versions_stored_are_passed_over(tmp_path):
    save(tiny_model("llama"), tmp_path)
    _change_weights(lambda weights: weights.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))(
        tmp_path
    )
    assert len(HuggingFaceReader(tmp_path).tensors) == 2 * 9 + 3


def test_an_output_that_is_the_embedding_once_more_is_passed_over(tmp_path):
    save(tiny_model("llama, tied"), tmp_path)
    expected = HuggingFaceReader(tmp_path).tensors.keys()
    _change_weights(lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))(tmp_path)
    reader = HuggingFaceReader(tmp_path)
    assert reader.args.tied_embeddings
    assert reader.tensors.keys() == expected


@pytest.mark.parametrize(
    ("name", "limit"),
    [
        ("mistral", None),
        ("mistral, window", WINDOW),
        ("qwen2", None),
        ("qwen2, window", WINDOW),
        ("llama, dynamic", 256),
    ],
)
def test_what_is_computed_for_short_sequences_only_says_so(tmp_path, name, limit):
    save(tiny_model(name), tmp_path / "original")
    make_tokenizer_json(tmp_path / "original")
    assert HuggingFaceReader(tmp_path / "original").args.context_limit == limit
    if limit is None:
        converted(tmp_path / "original", tmp_path / "converted", max_seq_len=100_000)
        return
    words = rf"^max_seq_len={limit + 1} must be at most context_limit={limit}: .*; lower max_seq_len$"
    with pytest.raises(ValueError, match=words):
        converted(tmp_path / "original", tmp_path / "converted", max_seq_len=limit + 1)
    folder = converted(tmp_path / "original", tmp_path / "converted", max_seq_len=limit)
    with pytest.raises(ValueError, match=words):
        engine_of(folder, max_seq_len=limit + 1)


@pytest.mark.parametrize(
    "changes",
    [
        {"use_sliding_window": False},
        {"layer_types": ["full_attention"] * 2},
        {"layer_types": None, "max_window_layers": 2},
        {"layer_types": None, "max_window_layers": None},  # 28 by default
    ],
    ids=str,
)
def test_a_window_that_no_layer_has_is_no_limit(tmp_path, changes):
    save(tiny_model("qwen2, window"), tmp_path)
    edit_config(tmp_path, **{"sliding_window": WINDOW, **changes})
    assert HuggingFaceReader(tmp_path).args.context_limit is None


def test_the_tokenizer_and_all_that_belongs_to_it_travel_along(tmp_path):
    source = save(tiny_model("qwen2"), tmp_path / "original")
    make_tokenizer_json(source)
    (source / "chat_template.jinja").write_text("é")
    (source / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    (source / "special_tokens_map.json").write_text("{}")
    folder = converted(source, tmp_path / "converted")
    names = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
    names |= {"generation_config.json", "chat_template.jinja"}
    assert all((folder / name).read_bytes() == (source / name).read_bytes() for name in names)
    rest = {path.name for path in folder.iterdir()} - names
    assert rest == {".metadata", "__0_0.distcp", "tensors.json", "manifest.json", "model_args.json"}
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.chat_template, tokenizer.stop_ids >= {1, 2}) == ("é", True)
    about = json.loads((folder / "manifest.json").read_text())["about"]
    assert about == {"source": "huggingface", "architecture": "Qwen2ForCausalLM", "dtype": "float32"}


def test_the_format_is_found_by_looking(tmp_path):
    save(tiny_model("llama"), tmp_path)
    assert isinstance(open_checkpoint(tmp_path), HuggingFaceReader)
    assert isinstance(open_checkpoint(tmp_path, model_parallel_size=1), HuggingFaceReader)
    with pytest.raises(ValueError, match=r"^model_parallel_size=2, but .* holds a Hugging Face model; leave it out$"):
        open_checkpoint(tmp_path, model_parallel_size=2)
    write_meta(tmp_path, meta_tensors())
    assert isinstance(open_checkpoint(tmp_path), FairscaleReader)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model.safetensors", "holds safetensors without the config.json of their Hugging Face model; download that"),
        ("model.gguf", "holds a GGUF model; convert that file with `llama-tp convert`"),
    ],
)
def test_a_folder_of_weights_alone_is_told_what_it_lacks(tmp_path, name, words):
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match=f"has no params.json: it {words}"):
        open_checkpoint(tmp_path)


def test_a_snapshot_of_the_hub_s_cache_is_read_through_its_links(tmp_path):
    cache = tmp_path / "models--tiny"
    (cache / "blobs").mkdir(parents=True)
    snapshot = save(tiny_model("llama"), cache / "snapshots" / "0123abcd")
    expected = HuggingFaceReader(snapshot).args
    for number, path in enumerate(list(snapshot.iterdir())):
        path.rename(cache / "blobs" / str(number))
        path.symlink_to(f"../../blobs/{number}")
    assert HuggingFaceReader(snapshot).args == expected
    assert HuggingFaceReader(snapshot).files == [snapshot / "model.safetensors"]


def _config(**changes):
    return lambda folder: edit_config(folder, **changes)


def _change_weights(change, file="model.safetensors"):
    def breaks(folder):
        weights = load_file(folder / file)
        change(weights)
        save_file(weights, folder / file)

    return breaks


def _write(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def _truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def _header_beyond_the_file(folder):
    path = folder / "model.safetensors"
    path.write_bytes((1 << 60).to_bytes(8, "little") + path.read_bytes()[8:])


def _as_pickles(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").touch()


def _repository(folder):
    (folder / "model.safetensors").unlink()
    write_meta(folder / "original", meta_tensors())


def _outside(name):
    def breaks(folder):
        target = folder.with_name("elsewhere")
        target.mkdir()
        shutil.move(folder / name, target / name)
        (folder / name).symlink_to(target / name)

    return breaks


def _torch_file(folder):
    torch.save({"a": torch.ones(3)}, folder / "model.safetensors")


Q, LM_HEAD = "model.layers.1.self_attn.q_proj.weight", "lm_head.weight"
ROPE = {"rope_theta": 1e4}
REFUSED = {
    "no config.json": (lambda folder: (folder / "config.json").unlink(), ("config.json is missing",)),
    "a config.json that is a page": (_write("config.json", b"<!DOCTYPE html>"), ("config.json is an HTML",)),
    "a config.json that is none": (_write("config.json", b"[1]"), ("config.json is not a JSON object",)),
    "a deep config.json": (_write("config.json", b"[" * 100_000), ("config.json is not valid JSON",)),
    "a huge config.json": (lambda folder: os.truncate(folder / "config.json", 1 << 27), ("has 134217728 bytes",)),
    "another architecture": (
        _config(architectures=["GemmaForCausalLM"]),
        ("architectures=['GemmaForCausalLM']", "LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3For"),
    ),
    "no architecture": (_config(architectures=None), ("architectures=None", "LlamaForCausalLM")),
    "odd architectures": (_config(architectures=[{}]), ("architectures=[{}]", "LlamaForCausalLM")),
    "quantized weights": (
        _config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        ("quant_method='bitsandbytes'", "original"),
    ),
    "another activation": (_config(hidden_act="gelu"), ("hidden_act='gelu'", "only 'silu'")),
    "yarn": (
        _config(rope_parameters={**ROPE, "rope_type": "yarn", "factor": 4.0}),
        ("rope_parameters with rope_type='yarn'", "supported: default, linear, llama3, dynamic"),
    ),
    "longrope of transformers 4": (
        _config(rope_scaling={"type": "longrope", "short_factor": [1.0]}),
        ("rope_scaling with rope_type='longrope'",),
    ),
    "rotations by layer": (
        _config(rope_parameters={"full_attention": ROPE, "sliding_attention": ROPE}),
        ("rope_parameters=", "one rotation for all layers"),
    ),
    "partly rotated heads": (_config(partial_rotary_factor=0.5), ("partial_rotary_factor=0.5",)),
    "a factor of 0": (_config(rope_scaling={"type": "linear", "factor": 0}), ("rope_scaling.factor=0.0 must be",)),
    "no factor": (_config(rope_scaling={"type": "linear"}), ("key 'factor' is missing",)),
    "a rope_theta that is text": (
        _config(rope_parameters={"rope_theta": "1e4"}),
        ("rope_theta='1e4' must be a number",),
    ),
    "a missing key": (_config(intermediate_size=None), ("key 'intermediate_size' is missing",)),
    "a missing epsilon": (_config(rms_norm_eps=None), ("key 'rms_norm_eps' is missing",)),
    "a size that is text": (_config(hidden_size="64"), ("hidden_size='64' must be an integer of at least 0",)),
    "a switch that is a number": (_config(attention_bias=1), ("attention_bias=1 must be true or false",)),
    "heads that do not divide": (
        _config(num_attention_heads=6, num_key_value_heads=6, head_dim=None),
        ("hidden_size=64 must be a multiple of num_attention_heads=6",),
    ),
    "kv heads that do not divide": (_config(num_key_value_heads=3), ("num_attention_heads=4", "num_key_value_heads=3")),
    "pickles": (_as_pickles, ("holds pytorch_model.bin, a pickle, which is not loaded", "save_pretrained(other)")),
    "a repository without its weights": (_repository, ("Meta's original weights are in", "/original")),
    "no weights": (
        lambda folder: (folder / "model.safetensors").unlink(),
        ("neither model.safetensors nor model.safetensors.index.json",),
    ),
    "truncated": (_truncate, ("model.safetensors is truncated or corrupt", "download it again")),
    "a header beyond the file": (_header_beyond_the_file, ("model.safetensors is truncated or corrupt",)),
    "garbage": (_write("model.safetensors", b"\x01" * 9999), ("model.safetensors is truncated or corrupt",)),
    "empty": (_write("model.safetensors", b""), ("model.safetensors is empty; download it again",)),
    "a Git LFS pointer": (
        _write("model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:9e\nsize 49\n"),
        ("model.safetensors is a Git LFS pointer", "git lfs pull"),
    ),
    "a login page": (_write("model.safetensors", b"<html>Sign in"), ("model.safetensors is an HTML", "download")),
    "a file of torch's": (_torch_file, ("model.safetensors was written by torch.save",)),
    "weights elsewhere": (_outside("model.safetensors"), ("model.safetensors is a link that leaves the folder",)),
    "a config.json elsewhere": (_outside("config.json"), ("config.json is a link that leaves the folder",)),
    "a missing tensor": (
        _change_weights(lambda weights: weights.pop(Q)),
        (f"1 tensor(s) missing: {Q}", "config.json"),
    ),
    "an unexpected tensor": (
        _change_weights(lambda weights: weights.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(16)})),
        ("model.safetensors: 1 tensor(s) unexpected: model.layers.0.self_attn.q_norm.weight",),
    ),
    "fewer layers in config.json": (_config(num_hidden_layers=1), ("9 tensor(s) unexpected: model.layers.1.",)),
    "more layers in config.json": (_config(num_hidden_layers=3), ("9 tensor(s) missing: model.layers.2.",)),
    "a billion layers in config.json": (
        _config(num_hidden_layers=10**9),
        ("num_hidden_layers=1000000000 must be at most 10000",),
    ),
    "a wrong shape": (
        _change_weights(lambda weights: weights.update({Q: weights[Q][:-1].clone()})),
        (f"model.safetensors: {Q} has shape (63, 64), expected (64, 64) from config.json",),
    ),
    "another head size in config.json": (_config(head_dim=8), ("has shape (64, 64), expected (32, 64)",)),
    "another vocabulary in config.json": (_config(vocab_size=400), ("embed_tokens.weight has shape (416, 64)",)),
    "biases that config.json does not tell of": (
        _change_weights(lambda weights: weights.update({Q.replace("weight", "bias"): torch.ones(64)})),
        ("unexpected: model.layers.1.self_attn.q_proj.bias",),
    ),
    "integers": (
        _change_weights(lambda weights: weights.update({Q: weights[Q].to(torch.int8)})),
        (f"{Q} is I8, expected BF16, F16, F32",),
    ),
    "an output that is missing": (
        _change_weights(lambda weights: weights.pop(LM_HEAD)),
        ("config.json says tie_word_embeddings=false, but there is no lm_head.weight", "set it to true"),
    ),
    "an output that is not tied": (
        _config(tie_word_embeddings=True),
        (
            "config.json says tie_word_embeddings=true, but lm_head.weight in model.safetensors is not",
            "set it to false",
        ),
    ),
    "layers of another kind": (
        lambda folder: edit_config(folder, architectures=["Qwen2ForCausalLM"], layer_types=["linear_attention"]),
        ("layer_types with 'linear_attention'",),
    ),
}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return save(tiny_model("llama"), tmp_path_factory.mktemp("original"))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    return save(tiny_model("llama"), tmp_path_factory.mktemp("sharded"), max_shard_size="100KB")


def assert_refused(folder, words):
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(ValueError, match=r".") as error:
        HuggingFaceReader(folder)
    message = str(error.value)
    assert "\n" not in message
    assert str(folder) in message
    assert all(word in message for word in words), message
    assert not isinstance(error.value, ConfigError)
    assert sorted(path.name for path in folder.iterdir()) == before


@pytest.mark.parametrize("case", REFUSED)
def test_an_unsound_model_is_refused_in_one_line_that_says_where_and_what(original, tmp_path, case):
    breaks, words = REFUSED[case]
    folder = shutil.copytree(original, tmp_path / "model")
    breaks(folder)
    assert_refused(folder, words)


INDEX = "model.safetensors.index.json"


def _index(change):
    def breaks(folder):
        index = json.loads((folder / INDEX).read_text())
        change(index["weight_map"])
        (folder / INDEX).write_text(json.dumps(index))

    return breaks


def _swap(folder):
    first, second = sorted(folder.glob("model-*.safetensors"))[:2]
    first.rename(folder / "spare")
    second.rename(first)
    (folder / "spare").rename(second)


def _copy_into_another(folder):
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    first = min(weight_map.values())
    _change_weights(lambda weights: weights.update({Q: torch.ones(64, 64)}), first)(folder)


REFUSED_SHARDS = {
    "a missing shard": (
        lambda folder: min(folder.glob("model-*.safetensors")).unlink(),
        ("model-00001-of-", "is missing, but model.safetensors.index.json names it", "download it again"),
    ),
    "a missing index": (
        lambda folder: (folder / INDEX).unlink(),
        ("model.safetensors.index.json is missing; without it",),
    ),
    "swapped shards": (_swap, ("model-00001-of-", "is missing, but model.safetensors.index.json says it is there")),
    "a tensor in two shards": (_copy_into_another, (Q, "as well")),
    "an index that is no object": (_write(INDEX, b"[]"), (f"{INDEX} is not a JSON object",)),
    "an index without a map": (_write(INDEX, b"{}"), (f"{INDEX}: weight_map must map tensors to files",)),
    "an index that names another folder": (
        _index(lambda weight_map: weight_map.update({Q: "../model.safetensors"})),
        (f"{INDEX}: {Q} is said to be in '../model.safetensors'", "of this folder"),
    ),
    "an index that names a pickle": (
        _index(lambda weight_map: weight_map.update({Q: "pytorch_model.bin"})),
        ("'pytorch_model.bin'",),
    ),
    "an index that names a number": (_index(lambda weight_map: weight_map.update({Q: 1})), ("is said to be in 1",)),
    "an index elsewhere": (_outside(INDEX), (f"{INDEX} is a link that leaves the folder",)),
}


@pytest.mark.parametrize("case", REFUSED_SHARDS)
def test_unsound_shards_are_refused_in_one_line_that_says_where_and_what(sharded, tmp_path, case):
    breaks, words = REFUSED_SHARDS[case]
    folder = shutil.copytree(sharded, tmp_path / "model")
    breaks(folder)
    assert_refused(folder, words)
