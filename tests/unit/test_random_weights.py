"""Random weights instead of a checkpoint: the same everywhere, in every format, and never zeros."""

from __future__ import annotations

import json

import pytest
import torch

from llama_tp.bench.peers import transformers_model
from llama_tp.bench.subject import EngineOptions, Subject, architecture, choose_subject, kernels_of
from llama_tp.engine.sampling_params import SamplingParams
from llama_tp.model.linear import Linear
from llama_tp.model.published import PUBLISHED
from llama_tp.model.random_weights import STD, RandomWeights, random_linear
from llama_tp.model.weights import DENSE, Quantized, quantized_args, quantized_formats, weight_shapes
from llama_tp.model_args import ModelArgs
from llama_tp.parallel.comm import SingleComm
from llama_tp.parallel.launch import Group

ALONE = Group(SingleComm(), torch.device("cpu"), None)
ARGS = ModelArgs(dim=64, n_layers=2, n_heads=2, n_kv_heads=1, vocab_size=160, ffn_hidden_dim=96)
PROMPT = list(range(3, 19))


def engine_of(subject, **options):
    return subject.load(EngineOptions(**{"dtype": "float32", "threads": 1, **options}).config(max_seq_len=64), ALONE)


def test_an_engine_with_random_weights_continues_prompts_as_transformers_does_with_the_same_names_weights():
    params = SamplingParams(max_new_tokens=12, temperature=0)
    ours = engine_of(Subject("random", ARGS, None)).generate([PROMPT], params)[0].token_ids
    weights = RandomWeights("cpu")
    dense = {name: weights.tensor(name, shape, torch.float32) for name, shape in weight_shapes(ARGS).items()}
    model = transformers_model(ARGS, dense, torch.float32)
    ids = torch.tensor([PROMPT])
    theirs = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None)[0, ids.size(1) :].tolist()
    assert ours == theirs
    assert len(set(ours)) > 1


@pytest.mark.parametrize("form", ["int8", "int4"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("compile", "kernels"), [("auto", "compiled kernels"), (False, "eager")])
def test_a_quantized_engine_needs_no_quantization_of_its_random_weights(form, dtype, compile, kernels):
    subject = Subject("random", quantized_args(ARGS), None, quantized_formats(ARGS, form))
    engine = engine_of(subject, dtype=dtype, compile=compile)
    assert kernels_of(engine) == kernels
    assert form in engine.quantization
    completion = engine.generate([PROMPT], SamplingParams(max_new_tokens=4, temperature=0))[0]
    assert len(completion.token_ids) == 4
    assert completion.error is None


@pytest.mark.parametrize("form", [DENSE, Quantized("int8"), Quantized("int8_groups"), Quantized("int4")])
def test_weights_of_every_format_have_the_deviation_of_a_fresh_model_and_no_bias(form):
    weight = random_linear("any", 512, 512, form, torch.bfloat16, RandomWeights("cpu")).dense_weight().float()
    assert weight.std().item() == pytest.approx(STD, rel=0.05)
    assert abs(weight.mean().item()) < STD / 20
    assert (weight == 0).float().mean() < 0.01


def test_layers_differ_and_a_name_has_the_same_values_in_every_process_and_shape():
    one, two = RandomWeights("cpu"), RandomWeights("cpu")
    a, b = (one.tensor(f"layers.{index}.attention.wq.weight", (32, 64), torch.float32) for index in (0, 1))
    assert not torch.equal(a, b)
    again = two.tensor("layers.0.attention.wq.weight", (64, 64), torch.float32)
    assert torch.equal(again[:32], a)


def test_a_tensor_longer_than_the_values_drawn_is_filled_to_its_end():
    long = RandomWeights("cpu").tensor("long.weight", (3, 1 << 20), torch.float32)
    assert all(row.std().item() == pytest.approx(STD, rel=0.05) for row in long)


def test_no_layer_shares_its_weights_with_another():
    engine = engine_of(Subject("random", ARGS, None))
    linears = [one for one in engine.runner.model.modules() if isinstance(one, Linear)]
    assert len(linears) == 4 * ARGS.n_layers + 1
    assert sum(one.num_bytes for one in linears) == sum(
        4 * one.in_features * one.out_features for one in linears
    )  # none is shared or missing


CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 96,
    "vocab_size": 160,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}


def test_the_architecture_comes_from_a_published_name_or_a_file_of_any_kind(tmp_path):
    assert architecture("tinyllama-1.1b") is PUBLISHED["tinyllama-1.1b"]
    ARGS.save(tmp_path / "model_args.json")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert architecture(str(tmp_path / "model_args.json")) == ARGS
    assert architecture(str(tmp_path / "config.json")).ffn_hidden_dim == 96
    (tmp_path / "params.json").write_text('{"dim": 64, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "vocab_size": -1}')
    with pytest.raises(ValueError, match="vocab_size=-1 does not give the vocabulary size"):
        architecture(str(tmp_path / "params.json"))
    with pytest.raises(ValueError, match=r"did you mean tinyllama-1.1b\?.* nor is there a file of this name"):
        architecture("tinyllama-1b")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"checkpoint": None}, "give a converted checkpoint, or --random-weights --model NAME"),
        ({"checkpoint": "a", "random_weights": True}, "also the checkpoint a; leave one of them out"),
        ({"checkpoint": None, "random_weights": True}, "random_weights needs --model"),
        ({"checkpoint": "a", "model": "llama2-7b"}, "model='llama2-7b' is for random weights"),
        ({"checkpoint": None, "random_weights": "llama2-7b"}, "must have no value; name the model by --model"),
        (
            {"checkpoint": None, "random_weights": True, "model": "llama2-7b", "quantization": "int3"},
            "quantize='int3' must be one of int8, int4",
        ),
    ],
)
def test_a_command_line_that_names_no_model_or_two_is_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        choose_subject(**settings)
