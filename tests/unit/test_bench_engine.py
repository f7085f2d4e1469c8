"""`llama-tp bench engine` on a tiny checkpoint: its table, its JSON and its refusals. What it measures is no test's."""

from __future__ import annotations

import json

import pytest
import torch

from llama_tp.bench import engine as bench
from llama_tp.bench.peers import transformers_model
from llama_tp.cli.bench import engine as bench_engine
from llama_tp.cli.bench import load
from llama_tp.engine.prompt_lookup import PromptLookup
from llama_tp.model_args import ModelArgs
from tests.tiny_converted import convert_beside, write_originals
from tests.tiny_model import MODELS, engine_of, random_model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(convert_beside(write_originals(tmp_path_factory.mktemp("bench") / "originals"), max_seq_len=64))


@pytest.mark.parametrize("against", [None, "transformers", "deterministic", "no_prefix_cache", "no_speculation"])
def test_every_contender_has_a_row_for_each_batch_size(checkpoint, capsys, against):
    bench_engine(checkpoint, batch=(1, 2), prompt=24, prefix=16, new=3, runs=1, against=against, dtype="float32")
    *table, last = capsys.readouterr().out.splitlines()
    rows = json.loads(last)
    names = ["llama_tp"] + ([against] if against else [])
    assert [(row["batch"], row["contender"]) for row in rows] == [(size, name) for size in (1, 2) for name in names]
    assert all(row["prefill_tokens_per_s"] > 0 and row["decode_tokens_per_s"] > 0 for row in rows)
    assert "prompts of 24 tokens, 16 of them shared, 3 new; median of 1 runs" in table[0]
    assert sum("ratio" in line for line in table) == 2 * (len(names) - 1)
    gain = rows[-len(names)]["decode_tokens_per_s"] / rows[0]["decode_tokens_per_s"]
    assert table[-1] == f"batch 2 decodes {gain:.2f} times as many tokens per second as batch 1"


@pytest.mark.parametrize("drafted", [0, 3])
def test_drafted_tokens_are_reported_with_those_that_were_right(checkpoint, capsys, monkeypatch, drafted):
    monkeypatch.setattr(PromptLookup, "draft", lambda self, tokens, most: (7,) * most)
    options = {"batch": (1, 3), "prompt": 24, "new": 30, "runs": 1, "dtype": "float32", "speculative_tokens": drafted}
    bench_engine(checkpoint, **options)
    one, three = json.loads(capsys.readouterr().out.splitlines()[-1])
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


def test_tokens_that_were_decoded_beside_prompts_do_not_count_as_decoded_after_them(monkeypatch):
    """They did: at batch 16 the rate was 4 % too high, with long prompts 46 %."""
    engine = engine_of(random_model(MODELS["gqa"]), max_batched_tokens=24)
    monkeypatch.setattr(bench, "perf_counter", Clock(engine))
    timing = bench.OurEngine(engine).run([[1 + row] * 20 for row in range(4)], 6)
    # Steps of 20 + 4, 1 + 16 + 7, 1 + 1 + 13 + 9, 1 + 1 + 1 + 11 tokens: then there are 4, 3, 2 and 1 new ones.
    assert timing == bench.Timing(prefill_s=4, decode_s=5, decoded=4 * 6 - (4 + 3 + 2 + 1))


def test_without_transformers_it_is_said_how_to_get_it_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr(bench, "find_spec", lambda _name: None)
    with pytest.raises(ValueError, match=r"transformers is not installed; run pip install 'llama-tp\[bench\]'"):
        bench_engine("nowhere", against="transformers")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"against": "vllm"}, "against='vllm' must be one of transformers, deterministic, no_prefix_cache"),
        ({"batch": "a"}, "batch=a must be integers of at least 1"),
        ({"batch": (1, 0)}, "batch=1,0 must be integers of at least 1"),
        ({"runs": 0}, "runs=0 must be an integer of at least 1"),
        ({"new": 1}, "new=1 must be at least 2"),
        ({"prompt": 8, "prefix": 8}, "prefix=8 must be at least 0 and less than prompt=8"),
    ],
)
def test_what_cannot_be_measured_is_refused_by_name(checkpoint, settings, words):
    with pytest.raises(ValueError, match=words):
        bench_engine(checkpoint, **settings)


def test_a_model_that_transformers_does_not_have_is_refused_by_name():
    args = ModelArgs(dim=64, n_layers=1, n_heads=4, n_kv_heads=4, vocab_size=64, wo_bias=True)
    with pytest.raises(ValueError, match="no Llama-like model with qkv_bias=False, wo_bias=True, ffn_bias=False"):
        transformers_model(args, {}, torch.float32)
