"""The demo's weights, read by transformers straight from the GGUF file, are the oracle for everything between that file
and our tokens: dequantizing, Meta's shards, conversion, sharding, the model, greedy search. In float32."""

from __future__ import annotations

import json
import math
from importlib.resources import files

import pytest
import torch

import llama_tp
from llama_tp.bench.quality import TEXT, WINDOW
from llama_tp.checkpoint import demo
from llama_tp.checkpoint.store.manifest import HASH_CACHE, MANIFEST
from llama_tp.cli.bench import quality
from llama_tp.cli.checkpoints import convert
from tests.distributed.torchrun import check, torchrun
from tests.e2e.demo_answers import ANSWER

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def greedy(demo_folder, tmp_path_factory):
    """By number of ranks: pairs of prompt ids and generated ids."""
    checkpoint, tokenizer = demo_folder / "converted_checkpoints", demo_folder / "weights" / "tokenizer.json"
    folder = tmp_path_factory.mktemp("greedy")

    def run(ranks):
        out = folder / f"{ranks}.json"
        check(torchrun(ranks, "tests.e2e.demo_worker", str(checkpoint), str(tokenizer), str(out)))
        return json.loads(out.read_text())

    return {ranks: run(ranks) for ranks in (1, 2, 3)}


def test_greedy_tokens_are_the_same_on_one_rank_two_and_three(greedy):
    assert greedy[1] == greedy[2] == greedy[3]
    assert all(len(generated) == 48 for _, generated in greedy[1])


def test_the_capital_of_france_is_paris(greedy, demo_folder):
    tokenizer = llama_tp.load_tokenizer(demo_folder / "weights")
    for pairs in greedy.values():
        assert tokenizer.decode(pairs[-1][1]).startswith(ANSWER)


def test_greedy_tokens_are_those_of_transformers(greedy, demo_in_transformers):
    model, _ = demo_in_transformers
    for prompt, generated in greedy[1]:
        ids = torch.tensor([prompt])
        expected = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=48, do_sample=False, eos_token_id=None
        )
        assert generated == expected[0, len(prompt) :].tolist()


def test_perplexity_is_that_of_transformers(demo_folder, demo_in_transformers, capsys):
    """Of the text of `bench quality`, in windows of 512 of their tokenizer's tokens."""
    model, tokenizer = demo_in_transformers
    quality(str(demo_folder / "converted_checkpoints"), dtype="float32")
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    ids = tokenizer((files("llama_tp.bench") / TEXT).read_text(), return_tensors="pt").input_ids
    windows = [window for window in ids.split(WINDOW, dim=1) if window.size(1) > 1]
    with torch.inference_mode():
        losses = [model(window, labels=window).loss.item() * (window.size(1) - 1) for window in windows]
    assert figures["tokens"] == sum(window.size(1) - 1 for window in windows)
    assert figures["perplexity"] == pytest.approx(math.exp(sum(losses) / figures["tokens"]), rel=1e-4)


def test_the_publishers_file_is_converted_by_itself_to_the_same_checkpoint(demo_folder, tmp_path):
    """The demo goes by way of Meta's shards, and gets its tokenizer beforehand."""
    convert(str(demo.extract_gguf(tmp_path)), str(tmp_path / "own"), max_batch_size=8, tp_max=3, quantize="none")
    own, by_shards = (
        {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in (MANIFEST, HASH_CACHE)}
        for folder in (tmp_path / "own", demo_folder / "converted_checkpoints")
    )
    assert {"tokenizer.json", "tokenizer_config.json", "model_args.json"} < own.keys()
    assert own == by_shards
