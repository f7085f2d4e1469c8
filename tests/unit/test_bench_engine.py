"""`llama-tp bench engine` on a tiny checkpoint: its table, its JSON and its refusals. What it measures is no test's."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch

from llama_tp.bench import contenders
from llama_tp.bench import engine as bench
from llama_tp.bench.ceilings import Ceilings
from llama_tp.bench.engine import CONTENDERS
from llama_tp.bench.peers import transformers_model
from llama_tp.bench.structured import endless_records
from llama_tp.bench.subject import EngineOptions, choose_subject, kernels_of
from llama_tp.bench.unparallelized import unparallelized_engine
from llama_tp.bench.work import Work
from llama_tp.cli.bench import engine as bench_engine
from llama_tp.cli.bench import load
from llama_tp.engine.prompt_lookup import PromptLookup
from llama_tp.model.transformer import Attention
from llama_tp.model_args import ModelArgs
from llama_tp.parallel.comm import SingleComm
from llama_tp.parallel.launch import Group
from llama_tp.parallel.local_modules import FusedAttention
from llama_tp.text import load_tokenizer
from tests.tiny_converted import convert_beside, write_originals
from tests.tiny_model import MODELS, engine_of, random_model, transformers_twin


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(convert_beside(write_originals(tmp_path_factory.mktemp("bench") / "originals"), max_seq_len=64))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Ceilings of a machine that is easily known."""
    monkeypatch.setattr(bench, "read_bandwidth", lambda _device: 1e10)
    monkeypatch.setattr(bench, "gemm_rate", lambda _device, _dtype: 1e11)
    monkeypatch.setattr(bench, "measure_ceilings", lambda _device, _dtype: Ceilings(1e9, 1e12, "float32"))


@pytest.mark.parametrize("against", [None, *CONTENDERS])
def test_every_contender_has_a_row_for_each_batch_size(checkpoint, capsys, against):
    bench_engine(checkpoint, batch=(1, 2), prompt=24, prefix=16, new=3, runs=1, against=against, dtype="float32")
    *table, last = capsys.readouterr().out.splitlines()
    document = json.loads(last)
    rows = document["rows"]
    names = ["llama_tp"] + ([against] if against else [])
    assert document["benchmark"] == "engine"
    assert (document["read_bytes_per_s"], document["flops"]) == (1e10, 1e12)  # of before and after, the better
    assert [(row["batch"], row["contender"]) for row in rows] == [(size, name) for size in (1, 2) for name in names]
    for name in ("prefill_tokens_per_s", "prefill_share", "decode_tokens_per_s", "decode_share", "step_p99_ms"):
        assert all(row[name] > 0 for row in rows)
    assert "prompts of 24 tokens, 16 of them shared, 3 new; median of 1 runs" in table[0]
    assert sum("ratio" in line for line in table) == 2 * (len(names) - 1)
    gain = rows[-len(names)]["decode_tokens_per_s"] / rows[0]["decode_tokens_per_s"]
    assert f"batch 2 decodes {gain:.2f} times as many tokens per second as batch 1" in table
    assert "Note: a step reads 0 MB of weights, less than 4 times the cache" in table[-1]


def test_every_context_has_a_row_and_a_prompt_of_one_token_no_prefill(tmp_path, capsys):
    args = ModelArgs(dim=64, n_layers=2, n_heads=2, n_kv_heads=1, vocab_size=160, ffn_hidden_dim=96)
    args.save(tmp_path / "params.json")
    model = str(tmp_path / "params.json")
    bench_engine(
        random_weights=True,
        model=model,
        batch=2,
        prompt=8,
        depth=(0, 16),
        new=3,
        runs=1,
        quantization="int4",
        dtype="bfloat16",
    )
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["context"] for row in document["rows"]] == [0, 8, 16]
    assert [row["prefill_tokens_per_s"] is None for row in document["rows"]] == [True, False, False]
    assert document["model"] == f"{model}, random weights in int4"


def test_beside_a_busy_process_every_row_is_measured_again(checkpoint, capsys):
    bench_engine(checkpoint, batch=1, prompt=8, new=3, runs=1, neighbour=True, dtype="float32")
    *table, last = capsys.readouterr().out.splitlines()
    assert [row["condition"] for row in json.loads(last)["rows"]] == ["idle", "beside"]
    assert sum(line.startswith("  beside / idle") for line in table) == 1


def test_what_a_step_reads_and_computes_is_counted_from_the_shapes_alone():
    args = MODELS["gqa"]
    work = Work.of(engine_of(random_model(args)))
    layer = 96 * (96 + 2 * 32) + 96 * 96 + 3 * args.hidden_dim * 96
    assert work.layer_flops == 2 * 2 * layer
    assert work.output_flops == 2 * 128 * 96
    assert work.weight_bytes == 4 * (2 * layer + 128 * 96)
    assert work.kv_bytes == 2 * 2 * 32 * 4
    assert work.decode_bytes(3, 10, shared=4) == work.weight_bytes + work.kv_bytes * (4 + 3 * 6)
    pairs = 2 * (1 + 2 + 3)  # of each prompt's tokens, and those that they see
    assert work.prefill_flops(2, 3) == 6 * work.layer_flops + 2 * work.output_flops + pairs * 4 * 2 * 96
    assert work.prefill_flops(2, 3, shared=2) == (
        4 * work.layer_flops + 2 * work.output_flops + (3 + 2 * 3) * 4 * 2 * 96
    )


def test_compiled_kernels_read_and_compute_the_same(checkpoint):
    subject = choose_subject(checkpoint)
    group = Group(SingleComm(), torch.device("cpu"), None)
    compiled, eager = (
        subject.load(EngineOptions(compile=compile, dtype="float32").config(max_seq_len=64), group)
        for compile in ("auto", False)
    )
    assert (kernels_of(compiled), kernels_of(eager)) == ("compiled kernels", "eager")
    assert Work.of(compiled) == Work.of(eager)


@pytest.mark.parametrize("compile", ["auto", False])
def test_what_computes_is_printed_and_in_the_document(checkpoint, capsys, compile):
    kernels = "eager" if compile is False else "compiled kernels"
    bench_engine(checkpoint, batch=1, prompt=8, new=3, runs=1, compile=compile, dtype="float32")
    first, *_, last = capsys.readouterr().out.splitlines()
    assert f"float32, {kernels}; prompts of 8 tokens" in first
    assert json.loads(last)["kernels"] == kernels
    load(checkpoint, requests=3, max_batch_size=1, dtype="float32", compile=compile)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["kernels"] == kernels


@pytest.mark.parametrize(("batch", "steps", "decoded", "drafted"), [(1, 2, 5, 5), (2, 5, 5 * 3 + 5, 12)])
def test_a_run_lasts_until_the_slowest_sequence_has_its_tokens(monkeypatch, batch, steps, decoded, drafted):
    """With drafts, one sequence decodes three tokens per step, the other one. In a batch of one, only two steps do."""
    monkeypatch.setattr(PromptLookup, "draft", lambda self, tokens, most: truth[tokens[0]][len(tokens) :][:most])
    model, prompts = random_model(MODELS["gqa"]), [[1] * 5, [2] * 5]
    context = contenders.longest_sequence(batch, 5, 6, 512, speculative_tokens=2, speculative_max_batch=2)
    limits = {"max_seq_len": context, "max_batched_tokens": 512}
    plain = contenders.OurEngine(engine_of(model, **limits)).run(prompts[:1], context - 5)
    truth = {1: (*prompts[0], *plain.first_tokens), 2: ()}
    timing = contenders.OurEngine(engine_of(model, **limits, speculative_tokens=2)).run(prompts[:batch], 6)
    assert timing.first_tokens == plain.first_tokens[:6]
    assert (len(timing.steps_s), timing.decoded) == (steps, decoded)
    assert (timing.drafted, timing.accepted) == (drafted, drafted), "2 of them in the prefill"


@pytest.mark.parametrize("drafted", [0, 3])
def test_drafted_tokens_are_reported_with_those_that_were_right(checkpoint, capsys, monkeypatch, drafted):
    monkeypatch.setattr(PromptLookup, "draft", lambda self, tokens, most: (7,) * most)
    options = {"batch": (1, 3), "prompt": 24, "new": 30, "runs": 1, "dtype": "float32", "speculative_tokens": drafted}
    bench_engine(checkpoint, **options)
    *_, note, last = capsys.readouterr().out.splitlines()
    one, three = json.loads(last)["rows"]
    assert ("drafted tokens were right" in note) is (drafted > 0)
    assert 0 <= one["accepted_tokens"] <= one["drafted_tokens"]
    assert (one["drafted_tokens"] > 0) is (drafted > 0)
    assert three["drafted_tokens"] == 0, "more than speculative_max_batch"
    load(checkpoint, requests=3, max_batch_size=1, dtype="float32", speculative_tokens=drafted)
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["speculative_tokens"] == drafted
    assert 0 <= figures["accepted_tokens"] <= figures["drafted_tokens"]
    assert (figures["drafted_tokens"] > 0) is (drafted > 0)


class Clock:
    """A second passes with every step."""

    def __init__(self, engine):
        self.seconds = 0
        self.step = engine.step
        engine.step = self.advance

    def advance(self):
        self.seconds += 1
        return self.step()

    def __call__(self):
        return self.seconds


def test_all_sequences_decode_together_however_long_the_prefill_lets_the_first_ones_wait(monkeypatch):
    """Tokens decoded beside prompts counted as decoded after them: at batch 16 the rate was 4 % too high, with long
    prompts 46 %. Later, the first sequences ended first, and the batch shrank while it was measured."""
    engine = engine_of(random_model(MODELS["gqa"]), max_batched_tokens=24)
    monkeypatch.setattr(contenders, "perf_counter", Clock(engine))
    timing = contenders.OurEngine(engine).run([[1 + row] * 20 for row in range(4)], 6)
    # Steps of 20 + 4, 1 + 16 + 7, 1 + 1 + 13 + 9, 1 + 1 + 1 + 11 tokens: then all are in decode.
    assert (timing.prefill_s, timing.decode_s, timing.decoded) == (4, 5, 4 * 5)
    assert timing.steps_s == (1,) * 5
    assert engine.num_requests == 0


@pytest.mark.parametrize(("batch", "prompt", "budget"), [(4, 20, 24), (1, 50, 8), (8, 30, 9)])
def test_the_context_is_long_enough_for_all_sequences_to_decode_together(batch, prompt, budget):
    needed = contenders.longest_sequence(batch, prompt, 6, budget)
    limits = {"max_seq_len": needed, "max_batch_size": batch, "max_batched_tokens": budget}
    engine = engine_of(random_model(MODELS["gqa"]), **limits)
    assert contenders.OurEngine(engine).run([[1 + row] * prompt for row in range(batch)], 6).decoded == 5 * batch


def test_a_greedy_run_of_every_contender_gives_the_same_tokens():
    model = random_model(MODELS["gqa"])
    prompts = [[5, 6, 7, 8, 9], [9, 8, 7, 6, 5]]
    ours = contenders.OurEngine(engine_of(model)).run(prompts, 8)
    theirs = contenders.Transformers(transformers_twin(model)).run(prompts, 8)
    assert len(ours.first_tokens) == 8
    assert ours.first_tokens == theirs.first_tokens
    assert (ours.decoded, len(ours.steps_s)) == (theirs.decoded, len(theirs.steps_s)) == (14, 7)


def test_without_transformers_it_is_said_how_to_get_it_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr(bench, "find_spec", lambda _name: None)
    with pytest.raises(ValueError, match=r"transformers is not installed; run pip install 'llama-tp\[bench\]'"):
        bench_engine(random_weights=True, model="llama2-7b", against="transformers")


def test_structured_answers_are_the_beginning_of_a_list_of_records(checkpoint):
    subject = choose_subject(checkpoint)
    group = Group(SingleComm(), torch.device("cpu"), None)
    engine = subject.load(EngineOptions(dtype="float32").config(max_seq_len=64, max_batch_size=2), group)
    grammar = endless_records(checkpoint, subject.args.vocab_size)
    timing = contenders.OurEngine(engine, "structured", grammar=grammar).run([[5, 6, 7], [8, 9, 10]], 32)
    text = load_tokenizer(checkpoint).decode(timing.first_tokens)
    assert re.match(r'\s*\[\s*\{\s*"id"\s*:\s*\d', text), text
    assert (len(timing.first_tokens), timing.decoded) == (32, 62)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_model_that_was_never_parallelized_has_the_same_weights_and_plain_layers(checkpoint, dtype):
    subject = choose_subject(checkpoint)
    group = Group(SingleComm(), torch.device("cpu"), None)
    options = EngineOptions(dtype=dtype, compile=False)
    engine = subject.load(options.config(max_seq_len=64, max_batch_size=2), group)
    plain = unparallelized_engine(subject, engine)
    assert plain.runner.dtype == engine.runner.dtype
    assert {type(one.attention) for one in plain.runner.model.layers} == {Attention}
    assert {type(one.attention) for one in engine.runner.model.layers} == {FusedAttention}
    if dtype == "float32":
        prompts = [[5, 6, 7, 8, 9], [9, 8, 7, 6, 5]]
        ours, theirs = (contenders.OurEngine(one).run(prompts, 8).first_tokens for one in (engine, plain))
        assert ours == theirs


def test_tied_embeddings_are_tied_in_the_model_that_was_never_parallelized(tmp_path):
    args = ModelArgs(dim=64, n_layers=1, n_heads=2, n_kv_heads=1, vocab_size=160, ffn_hidden_dim=96)
    replace(args, tied_embeddings=True).save(tmp_path / "model_args.json")
    subject = choose_subject(None, random_weights=True, model=str(tmp_path / "model_args.json"))
    options = EngineOptions(dtype="float32", compile=False)
    engine = subject.load(options.config(max_seq_len=64), Group(SingleComm(), torch.device("cpu"), None))
    model = unparallelized_engine(subject, engine).runner.model
    assert model.output.weight is model.tok_embeddings.weight


def test_structured_answers_need_a_tokenizer():
    with pytest.raises(ValueError, match="against=structured needs a tokenizer; give a converted checkpoint"):
        bench_engine(random_weights=True, model="llama2-7b", against="structured")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"against": "vllm"}, "against='vllm' must be one of transformers, structured, unparallelized, deterministic"),
        ({"against": "unparallelized", "compile": True}, "two forms of the model in PyTorch; leave --compile out"),
        ({"batch": "a"}, "batch=a must be integers of at least 1"),
        ({"batch": (1, 0)}, "batch=1,0 must be integers of at least 1"),
        ({"runs": 0}, "runs=0 must be an integer of at least 1"),
        ({"new": 1}, "new=1 must be at least 2"),
        ({"prompt": 8, "prefix": 8}, "prefix=8 must be at least 0 and less than prompt=8"),
        ({"depth": (0, -1)}, "depth=0,-1 must be integers of at least 0"),
        ({"neighbour": 2}, "neighbour=2 must have no value"),
        ({"quantization": "int4"}, "quantization='int4', but the layers of .* are dense; convert the original weights"),
    ],
)
def test_what_cannot_be_measured_is_refused_by_name(checkpoint, settings, words):
    with pytest.raises(ValueError, match=words):
        bench_engine(checkpoint, **settings)


def test_a_model_that_transformers_does_not_have_is_refused_by_name():
    args = ModelArgs(dim=64, n_layers=1, n_heads=4, n_kv_heads=4, vocab_size=64, wo_bias=True)
    with pytest.raises(ValueError, match="no Llama-like model with qkv_bias=False, wo_bias=True, ffn_bias=False"):
        transformers_model(args, {}, torch.float32)
