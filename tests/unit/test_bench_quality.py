"""`llama-tp bench quality` on tiny checkpoints. transformers and torch are the oracles of its figures."""

from __future__ import annotations

import json
import math
from importlib.resources import files

import pytest
import torch
import torch.nn.functional as F

from llama_tp.bench import quality as bench
from llama_tp.cli.bench import quality as bench_quality
from llama_tp.model_args import ModelArgs
from llama_tp.text.tokenizer import load_tokenizer
from tests.tiny_converted import convert_beside, write_originals
from tests.tiny_model import MODELS, engine_of, random_model, transformers_twin

pytestmark = pytest.mark.usefixtures("one_thread")

WINDOWS = [
    [(7 * row + 3 * column * column) % 96 for column in range(size)] for row, size in ((0, 200), (1, 200), (5, 67))
]
"""In the vocabulary of the smallest model; more tokens than a piece, and a rest."""
LONG = {"max_seq_len": 512, "max_batched_tokens": 512, "max_batch_size": bench._PROMPTS}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(convert_beside(write_originals(tmp_path_factory.mktemp("quality") / "originals"), max_seq_len=2048))


def log_probs_of(model):
    """Of the next token at every position but the last of each window, by transformers, in float64."""
    twin = transformers_twin(model).double()
    return torch.cat([twin(torch.tensor([window])).logits[0, :-1].log_softmax(-1) for window in WINDOWS])


@pytest.mark.parametrize("name", ["gqa", "rope scaling", "tied"])
def test_perplexity_is_that_of_transformers(name):
    model = random_model(MODELS[name])
    targets = torch.tensor([token for window in WINDOWS for token in window[1:]])
    expected = F.nll_loss(log_probs_of(model), targets).exp().item()
    quality, agreement = bench.measure([engine_of(model, **LONG)], WINDOWS, new=4)
    assert quality.tokens == len(targets) == 464
    assert quality.perplexity == pytest.approx(expected, rel=1e-5)
    assert agreement is None
    few, _ = bench.measure([engine_of(model, **LONG)], WINDOWS, new=4, step=3)
    assert (few.tokens, few.perplexity) == (464, pytest.approx(expected, rel=1e-5))


def test_agreement_is_that_of_transformers_distributions():
    model, reference = random_model(MODELS["gqa"]), random_model(MODELS["gqa"])
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * weight.std() * torch.randn_like(weight)
    ours, theirs = log_probs_of(model), log_probs_of(reference)
    quality, agreement = bench.measure([engine_of(model, **LONG), engine_of(reference, **LONG)], WINDOWS, new=4)
    assert agreement.kl_divergence == pytest.approx(
        F.kl_div(ours, theirs, log_target=True, reduction="batchmean").item(), rel=1e-4
    )
    assert agreement.kl_divergence > 0.01
    same = (ours.argmax(-1) == theirs.argmax(-1)).double().mean().item()
    assert 0.1 < same < 0.95
    assert agreement.same_top_token == pytest.approx(same, abs=1e-9)
    swapped = bench.measure([engine_of(reference, **LONG), engine_of(model, **LONG)], WINDOWS, new=4)
    assert swapped[0].perplexity == agreement.perplexity
    assert swapped[1].perplexity == quality.perplexity
    assert swapped[1].kl_divergence != pytest.approx(agreement.kl_divergence, rel=1e-3)


def test_greedy_agreement_counts_the_tokens_before_the_first_that_differs(monkeypatch):
    engines = [engine_of(random_model(MODELS["gqa"], seed), **LONG) for seed in (0, 0)]
    _, agreement = bench.measure(engines, WINDOWS, new=6)
    assert (agreement.greedy_prompts, agreement.greedy_new, agreement.same_greedy_prompts) == (3, 6, 3)
    assert agreement.same_greedy_tokens == 6
    outputs = iter([[[1, 2, 3], [4, 5, 6], [7, 8, 9]], [[1, 2, 3], [4, 0, 6], [0, 8, 9]]])
    monkeypatch.setattr(bench, "_greedy", lambda *_: next(outputs))
    _, agreement = bench.measure(engines, WINDOWS, new=3)
    assert (agreement.same_greedy_prompts, agreement.same_greedy_tokens) == (1, (3 + 1 + 0) / 3)


def test_prompts_are_different_parts_of_the_text():
    windows = [list(range(512 * index, 512 * (index + 1))) for index in range(6)]
    prompts = bench._prompts(windows)
    assert [prompt[0] for prompt in prompts] == [0, 256, 512, 768, 1024, 1280, 1536, 1792]
    assert all(len(prompt) == 64 for prompt in prompts)


def test_a_table_and_a_line_of_json_are_printed(checkpoint, capsys):
    bench_quality(checkpoint, against=checkpoint, new=3, dtype="float32", threads=1)
    *table, last = capsys.readouterr().out.splitlines()
    figures = json.loads(last)
    against = figures.pop("against")
    assert figures["perplexity"] == against["perplexity"] > 1
    assert f"perplexity {figures['perplexity']:.4f}" in table
    assert (against["kl_divergence"], against["same_top_token"], against["same_greedy_tokens"]) == (0, 1, 3)
    bench_quality(checkpoint, dtype="float32", threads=1)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == figures


def test_windows_are_the_whole_text_and_begin_as_prompts_do(checkpoint):
    args = ModelArgs.load_converted(f"{checkpoint}/../model_args.json")
    tokenizer = load_tokenizer(checkpoint)
    windows = bench._windows(checkpoint, args)
    assert {len(window) for window in windows[:-1]} == {512}
    assert tokenizer.adds_bos
    assert {window[0] for window in windows} == {tokenizer.special_ids["<s>"]}
    text = (files("llama_tp.bench") / bench.TEXT).read_text()
    assert tokenizer.decode([token for window in windows for token in window[1:]]).strip() == text.strip()


def test_a_model_that_computes_nan_is_refused():
    model = random_model(MODELS["gqa"])
    with torch.no_grad():
        model.tok_embeddings.weight[WINDOWS[0][100]] = math.nan
    with pytest.raises(ValueError, match="numbers that are not finite; use dtype=float32, or verify the checkpoint"):
        bench.measure([engine_of(model, **LONG)], WINDOWS, new=1)


def test_what_cannot_be_measured_is_refused_by_name(checkpoint):
    with pytest.raises(ValueError, match="new=0 must be an integer of at least 1"):
        bench_quality(checkpoint, new=0)
    with pytest.raises(ValueError, match="step=513 must be an integer from 1 to 512"):
        bench_quality(checkpoint, step=513)
    sizes = [ModelArgs(dim=64, n_layers=1, n_heads=4, n_kv_heads=4, vocab_size=size) for size in (64, 65)]
    with pytest.raises(ValueError, match="a has vocab_size=64 and b has vocab_size=65: only checkpoints with the same"):
        bench._check_vocabulary(["a", "b"], sizes)


def test_the_text_is_long_enough_and_comes_with_the_package():
    words = (files("llama_tp.bench") / bench.TEXT).read_text().split()
    assert 1500 < len(words) < 3000
