"""Meta's own params.json are understood, whatever is wrong with one is said in a line, and limits are checked."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from llama_tp.config import EngineConfig
from llama_tp.model.rope import rope_table
from llama_tp.model.transformer import Transformer
from llama_tp.model.weights import weight_shapes
from llama_tp.model_args import ModelArgs, RopeScaling
from tests.published_params import (
    CODE_LLAMA_7B,
    LLAMA_2_7B,
    LLAMA_2_13B,
    LLAMA_2_70B,
    LLAMA_3_1_8B,
    LLAMA_3_1_70B,
    LLAMA_3_1_405B,
    LLAMA_3_2_1B,
    LLAMA_3_2_3B,
    LLAMA_3_8B,
)
from tests.tiny_model import VARIANTS
from tests.unit.problems import problems_of

# The hidden sizes are those of the published weights, the scalings those of the same models' config.json on the hub.
META = {
    "Llama 2 7B": (LLAMA_2_7B, 11008, 32, 128, None),
    "Llama 2 13B": (LLAMA_2_13B, 13824, 40, 128, None),
    "Llama 2 70B": (LLAMA_2_70B, 28672, 8, 128, None),
    "Llama 3 8B": (LLAMA_3_8B, 14336, 8, 128, None),
    "Llama 3.1 8B": (LLAMA_3_1_8B, 14336, 8, 128, RopeScaling(factor=8, original_max_seq_len=8192)),
    "Llama 3.1 70B": (LLAMA_3_1_70B, 28672, 8, 128, RopeScaling(factor=8, original_max_seq_len=8192)),
    "Llama 3.1 405B": (LLAMA_3_1_405B, 53248, 8, 128, RopeScaling(factor=8, original_max_seq_len=8192)),
    "Llama 3.2 1B": (LLAMA_3_2_1B, 8192, 8, 64, RopeScaling(factor=32, original_max_seq_len=8192)),
    "Llama 3.2 3B": (LLAMA_3_2_3B, 8192, 8, 128, RopeScaling(factor=32, original_max_seq_len=8192)),
    "Code Llama 7B": (CODE_LLAMA_7B, 11008, 32, 128, None),
}
TINY = {"dim": 64, "n_layers": 1, "n_heads": 4, "vocab_size": 100}


@pytest.mark.parametrize("name", META)
def test_meta_s_params_json_gives_the_sizes_of_the_published_weights(name, tmp_path):
    text, hidden_dim, n_kv_heads, head_dim, rope_scaling = META[name]
    (tmp_path / "params.json").write_text(text)
    args = ModelArgs.load(tmp_path / "params.json")
    assert (args.hidden_dim, args.n_kv_heads, args.head_dim) == (hidden_dim, n_kv_heads, head_dim)
    assert args.rope_scaling == rope_scaling
    assert args.vocab_size == json.loads(text).get("vocab_size", -1)
    assert args.rope_theta == json.loads(text).get("rope_theta", 10000.0)


@pytest.mark.parametrize("name", META)
def test_model_args_json_reads_back_as_it_was_written(name, tmp_path):
    args = ModelArgs.from_params({**json.loads(META[name][0]), "max_seq_len": 512, "max_batch_size": 2})
    args.save(tmp_path / "model_args.json")
    assert ModelArgs.load(tmp_path / "model_args.json") == args


@pytest.mark.parametrize(("params", "factor"), [(LLAMA_3_1_8B, 8.0), (LLAMA_3_2_1B, 32.0), (LLAMA_3_2_3B, 32.0)])
def test_scaled_frequencies_are_those_of_transformers(params, factor):
    """Llama 3.2's params.json says use_scaled_rope only: read with the factor of Llama 3.1 it talks, but worse."""
    args = ModelArgs.from_params(json.loads(params))
    hub = LlamaConfig(
        hidden_size=args.dim,
        num_attention_heads=args.n_heads,
        max_position_embeddings=131072,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    )
    expected = LlamaRotaryEmbedding(hub).inv_freq
    ours = rope_table(args, 2, "cpu")[1].angle()  # at position 1 the angle is the frequency
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=0)


def test_a_scaling_whose_factor_nobody_knows_is_refused_with_the_key_to_add():
    pruned = {**json.loads(LLAMA_3_2_1B), "n_layers": 12}
    (problem,) = problems_of(ModelArgs.from_params, pruned)
    assert '"rope_scaling_factor"' in problem
    for scaling in ({"low_freq_factor": 1.0}, {"high_freq_factor": 4.0, "original_max_seq_len": 8192}):
        (problem,) = problems_of(ModelArgs.from_params, {**TINY, "rope_scaling": scaling})
        assert '"rope_scaling_factor"' in problem
    assert ModelArgs.from_params({**pruned, "rope_scaling_factor": 32.0}).rope_scaling == RopeScaling(factor=32.0)


def test_a_factor_that_is_given_counts_more_than_the_shape():
    args = ModelArgs.from_params({**json.loads(LLAMA_3_2_1B), "rope_scaling_factor": 4.0})
    assert args.rope_scaling == RopeScaling(factor=4.0)


def test_a_hidden_size_that_meta_s_rule_does_not_give_can_be_said_outright():
    assert ModelArgs.from_params({**TINY, "dim": 576, "n_heads": 9, "ffn_hidden_dim": 1536}).hidden_dim == 1536


def test_a_head_size_need_not_be_that_of_the_width():
    """Qwen3 4B: 32 heads of 128 at a width of 2560."""
    args = ModelArgs.from_params({**TINY, "dim": 2560, "n_heads": 32, "attention_head_dim": 128})
    assert args.head_dim == 128
    assert weight_shapes(args)["layers.0.attention.wq.weight"] == (4096, 2560)
    assert weight_shapes(args)["layers.0.attention.wo.weight"] == (2560, 4096)
    assert ModelArgs.from_params({**TINY, "dim": 100, "n_heads": 8, "attention_head_dim": 16}).head_dim == 16


@pytest.mark.parametrize("args", VARIANTS.values(), ids=VARIANTS)
def test_what_meta_s_models_do_not_have_survives_model_args_json(args, tmp_path):
    args.save(tmp_path / "model_args.json")
    assert ModelArgs.load_converted(tmp_path / "model_args.json") == args


@pytest.mark.parametrize("args", VARIANTS.values(), ids=VARIANTS)
def test_the_weights_are_those_that_the_model_has(args):
    expected = {name: tuple(weight.shape) for name, weight in Transformer(args).named_parameters()}  # a tied one once
    assert weight_shapes(args) == expected


def test_a_context_beyond_what_is_computed_is_refused_with_the_remedy():
    """A window of 64 tokens hides nothing from a sequence of 64."""
    assert ModelArgs.from_params({**TINY, "context_limit": 64, "max_seq_len": 64}).context_limit == 64
    (problem,) = problems_of(ModelArgs.from_params, {**TINY, "context_limit": 64, "max_seq_len": 65})
    assert problem.startswith("max_seq_len=65 must be at most context_limit=64")
    assert problem.endswith("lower max_seq_len")


def test_keys_that_say_nothing_about_the_weights_are_passed_over():
    assert ModelArgs.from_params({**TINY, "model_parallel_size": 8}) == ModelArgs.from_params(TINY)


def test_the_rope_factors_mean_nothing_unless_scaling_is_on():
    assert ModelArgs.from_params({**TINY, "rope_scaling_factor": 32.0, "use_scaled_rope": False}).rope_scaling is None


@pytest.mark.parametrize("key", ["dim", "n_layers", "n_heads"])
def test_a_missing_key_is_named(key):
    assert problems_of(ModelArgs.from_params, {k: v for k, v in TINY.items() if k != key}) == [
        f"key {key!r} is missing"
    ]


def test_several_problems_are_said_at_once():
    params = {"dim": "64", "n_heads": 4, "vocab_size": 10, "moe": 8}
    problems = problems_of(ModelArgs.from_params, params)
    assert len(problems) == 3
    for words in (("'moe'", "unknown"), ("'n_layers'", "missing"), ('dim="64"', "integer")):
        assert any(all(word in problem for word in words) for problem in problems), (words, problems)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("dim", "64"),
        ("dim", 64.0),
        ("dim", True),
        ("dim", 0),
        ("n_layers", -1),
        ("n_layers", [1]),
        ("n_heads", 0),
        ("n_kv_heads", 0),
        ("vocab_size", 0),
        ("vocab_size", -2),
        ("vocab_size", True),
        ("multiple_of", 0),
        ("max_seq_len", 0),
        ("max_batch_size", False),
        ("norm_eps", "1e-5"),
        ("norm_eps", True),
        ("norm_eps", -1.0),
        ("norm_eps", float("nan")),
        ("rope_theta", "10000"),
        ("rope_theta", 0.0),
        ("rope_theta", float("inf")),
        ("ffn_dim_multiplier", "1.3"),
        ("ffn_dim_multiplier", -1.3),
        ("ffn_hidden_dim", 1.5),
        ("ffn_hidden_dim", 0),
        ("tied_embeddings", 1),
        ("attention_head_dim", 0),
        ("context_limit", 0),
        ("qkv_bias", 1),
        ("qk_norm", "yes"),
        ("rope_scaling", 8),
    ],
)
def test_a_wrong_value_is_named_with_its_key(key, value):
    (problem,) = problems_of(ModelArgs.from_params, {**TINY, "n_kv_heads": 2, key: value})
    assert f"{key}={json.dumps(value)}" in problem
    assert "must be" in problem


@pytest.mark.parametrize(
    "params",
    [
        {"use_scaled_rope": "no"},
        {"use_scaled_rope": 1},
        {"use_scaled_rope": True, "rope_scaling_factor": "8"},
        {"use_scaled_rope": True, "rope_scaling_factor": 8, "rope_low_freq_factor": True},
        {"use_scaled_rope": True, "rope_scaling_factor": 0},
        {"rope_scaling": {"factor": "8"}},
        {"rope_scaling": {"factor": 8.0, "kind": "yarn"}},
        {"rope_scaling": {"factor": -8.0}},
        {"rope_scaling": {"factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0}},
        {"rope_scaling": {"factor": 8.0, "original_max_seq_len": 0}},
        {"rope_scaling": {"factor": 8.0, "original_max_seq_len": 8192.5}},
    ],
    ids=str,
)
def test_rope_scaling_that_cannot_be_computed_with_is_refused(params):
    """A string in model_args.json went through, to fail as a TypeError on every rank once the weights were read."""
    (problem,) = problems_of(ModelArgs.from_params, {**TINY, **params})
    assert "must be" in problem


def test_an_unknown_key_in_rope_scaling_is_named():
    assert "'facto'" in problems_of(ModelArgs.from_params, {**TINY, "rope_scaling": {"facto": 8.0}})[0]


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"dim": 65}, ("dim=65", "n_heads=4")),
        ({"dim": 12}, ("3", "even")),
        ({"attention_head_dim": 15}, ("attention_head_dim=15", "even")),
        ({"n_kv_heads": 3}, ("n_heads=4", "n_kv_heads=3")),
    ],
    ids=["dim and heads", "odd head", "odd head of its own", "heads and kv heads"],
)
def test_fields_that_do_not_go_together_are_both_named(params, words):
    (problem,) = problems_of(ModelArgs.from_params, {**TINY, **params})
    assert all(word in problem for word in words)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:9e556af\nsize 123\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html>Sign in", "HTML"),
        (b'{"dim": 64,', "is not a JSON file"),
        (b"\xff\xfe{", "is not a JSON file"),
        (b"[" * 100_000, "is not a JSON file"),
        (b'{"dim": ' + b"1" * 5000 + b"}", "is not a JSON file"),
        (b"[1, 2]", "must hold a JSON object"),
        (b"null", "must hold a JSON object"),
        (b'{"dim": 64}', "is missing"),
    ],
    ids=["empty", "LFS", "HTML", "cut off", "not UTF-8", "deep", "digits", "list", "null", "incomplete"],
)
def test_a_broken_file_is_named_in_every_line(content, words, tmp_path):
    path = tmp_path / "params.json"
    path.write_bytes(content)
    problems = problems_of(ModelArgs.load, path)
    assert all(str(path) in problem and words in problem for problem in problems)


def test_a_file_that_is_not_there_is_named(tmp_path):
    assert problems_of(ModelArgs.load, tmp_path / "params.json") == [f"{tmp_path / 'params.json'} does not exist"]
    assert problems_of(ModelArgs.load, tmp_path) == [
        f"{tmp_path} is a folder; give the model_args.json or params.json in it"
    ]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_byte_order_mark_is_no_hindrance(encoding, tmp_path):
    (tmp_path / "params.json").write_bytes(LLAMA_2_7B.encode(encoding))
    assert ModelArgs.load(tmp_path / "params.json") == ModelArgs.from_params(json.loads(LLAMA_2_7B))


def test_a_config_json_of_hugging_face_is_one_line_that_says_which_file_to_give(tmp_path):
    """It was answered with 28 clauses, one for each key."""
    LlamaConfig(architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    (problem,) = problems_of(ModelArgs.load, tmp_path / "config.json")
    assert "Hugging Face config.json" in problem
    assert "params.json" in problem
    assert "model_args.json" in problem


def test_a_model_that_is_not_converted_is_told_from_one_that_is_not_there(tmp_path):
    """`llama-tp chat` of a folder from the hub was answered with "model_args.json does not exist"."""
    LlamaConfig().save_pretrained(tmp_path)
    (problem,) = problems_of(ModelArgs.load_converted, tmp_path / "model_args.json")
    assert "holds a Hugging Face model; convert it with `llama-tp convert`" in problem
    (tmp_path / "consolidated.00.pth").touch()
    (problem,) = problems_of(ModelArgs.load_converted, tmp_path / "model_args.json")
    assert "holds Meta's original weights; convert them" in problem


def test_many_unknown_keys_are_one_clause():
    (problem,) = problems_of(ModelArgs.from_params, {**TINY, **{f"key{number}": 0 for number in range(28)}})
    assert "'key0'" in problem
    assert "and 24 more" in problem


def test_an_open_vocabulary_is_no_converted_checkpoint(tmp_path):
    """Served, params.json was answered with a tokenizer of 32000 ids for an embedding of -1 rows."""
    path = tmp_path / "params.json"
    path.write_text(CODE_LLAMA_7B)
    (problem,) = problems_of(ModelArgs.load_converted, path)
    assert "vocab_size=-1" in problem
    assert "model_args.json of a converted checkpoint" in problem


def test_a_vocabulary_of_minus_one_takes_the_size_of_the_embedding():
    args = ModelArgs.from_params({**TINY, "vocab_size": -1})
    assert args.with_vocab_size(32000) == ModelArgs.from_params({**TINY, "vocab_size": 32000})
    with pytest.raises(ValueError, match=r"vocab_size=100 .* 99 rows"):
        ModelArgs.from_params(TINY).with_vocab_size(99)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_seq_len": 0}, ["max_seq_len=0"]),
        ({"page_size": True}, ["page_size=True"]),
        ({"max_batch_size": 1.0}, ["max_batch_size=1.0"]),
        ({"dtype": "int8"}, ["dtype='int8'", "bfloat16"]),
        ({"compile": "always"}, ["compile='always' must be one of auto, true, false"]),
        ({"compile": 1}, ["compile=1 must be one of auto, true, false"]),
        ({"device": "tpu"}, ["device='tpu'", "cuda"]),
        ({"verify_checkpoint": "never"}, ["verify_checkpoint='never'", "size"]),
        ({"max_batched_tokens": 7, "max_batch_size": 8}, ["max_batched_tokens=7", "max_batch_size=8"]),
        ({"heartbeat_s": 20.0, "collective_timeout_s": 20.0}, ["heartbeat_s=20.0", "collective_timeout_s=20.0"]),
        ({"heartbeat_s": 0.0}, ["heartbeat_s=0.0"]),
        ({"collective_timeout_s": float("nan")}, ["collective_timeout_s=nan"]),
    ],
    ids=str,
)
def test_engine_settings_that_cannot_work_are_refused(settings, words):
    (problem,) = problems_of(EngineConfig, **settings)
    assert all(word in problem for word in words)


def test_all_wrong_engine_settings_are_said_at_once():
    assert len(problems_of(EngineConfig, max_seq_len=-1, page_size=0, dtype="?", heartbeat_s=-1)) == 4


@pytest.mark.parametrize(("max_seq_len", "page_size", "pages"), [(1, 16, 1), (16, 16, 1), (17, 16, 2), (100, 7, 15)])
def test_the_cache_holds_every_sequence_at_full_length(max_seq_len, page_size, pages):
    config = EngineConfig(max_seq_len=max_seq_len, page_size=page_size, max_batch_size=3)
    assert (config.pages_per_sequence, config.num_pages) == (pages, 3 * pages)


def test_configurations_cannot_be_changed_behind_anyone_s_back():
    with pytest.raises(dataclasses.FrozenInstanceError):
        EngineConfig().max_seq_len = 1  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        ModelArgs.from_params(TINY).dim = 1  # type: ignore[misc]
