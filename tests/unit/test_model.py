"""The model's logits are those that transformers computes, however the tokens are fed to it."""

from __future__ import annotations

import pytest
import torch

from llama_tp.engine.sampling_params import SamplingParams
from llama_tp.engine.step import Chunk, StepPlan
from tests.tiny_model import MODELS, VARIANTS, engine_of, random_model, transformers_twin

TOLERANCE = 1e-4  # float32, absolute


@pytest.fixture(params=[*MODELS, *VARIANTS], scope="module")
def pair(request):
    model = random_model({**MODELS, **VARIANTS}[request.param])
    return model, transformers_twin(model)


def tokens_of(model, count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, model.args.vocab_size, (count,), generator=generator).tolist()


def expected_logits(twin, tokens):
    with torch.no_grad():
        return twin(torch.tensor([tokens])).logits[0]  # (T, V)


def pages(row, first, count):
    return tuple((row, index, first + index) for index in range(count))


def test_prefill_equals_transformers(pair):
    model, twin = pair
    tokens = tokens_of(model, 100)
    runner = engine_of(model).runner
    logits = runner.execute(StepPlan(1, (Chunk(0, 0, tuple(tokens), 1),), pages(0, 0, 7)))
    torch.testing.assert_close(logits[0], expected_logits(twin, tokens)[-1], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("scattered", [False, True], ids=["neighbouring pages", "scattered pages"])
@pytest.mark.parametrize("sizes", [[40, 1, 1, 1], [16, 24, 3, 1, 7], [1] * 12, [33, 30, 20]], ids=str)
def test_chunked_prefill_and_decode_equal_transformers(pair, sizes, scattered):
    model, twin = pair
    tokens = tokens_of(model, sum(sizes))
    expected = expected_logits(twin, tokens)
    runner = engine_of(model).runner
    table = (
        pages(2, 0, 8) if not scattered else tuple((2, i, page) for i, page in enumerate([9, 3, 20, 5, 1, 31, 7, 2]))
    )
    start = 0
    for size in sizes:
        chunk = Chunk(2, start, tuple(tokens[start : start + size]), 1)
        logits = runner.execute(StepPlan(1, (chunk,), table if start == 0 else ()))
        start += size
        torch.testing.assert_close(logits[0], expected[start - 1], atol=TOLERANCE, rtol=0)


def test_sequences_of_one_step_do_not_see_each_other(pair):
    """Two decodes, a chunk in mid prompt and a fresh prompt in one step, each as if it were alone."""
    model, twin = pair
    prompts = [tokens_of(model, count, seed=count) for count in (30, 9, 50, 21)]
    runner = engine_of(model).runner
    tables = tuple(update for row in range(4) for update in pages(row, 8 * row, 4))
    first = tuple(Chunk(row, 0, tuple(p[:n]), 0) for row, p, n in zip(range(3), prompts, (29, 8, 20), strict=0))
    assert runner.execute(StepPlan(1, first, tables)) is None
    second = tuple(
        Chunk(row, start, tuple(prompts[row][start:]), 1) for row, start in ((0, 29), (1, 8), (2, 20), (3, 0))
    )
    logits = runner.execute(StepPlan(2, second))
    for row, prompt in enumerate(prompts):
        torch.testing.assert_close(logits[row], expected_logits(twin, prompt)[-1], atol=TOLERANCE, rtol=0)


def test_engine_greedy_equals_transformers_generate_on_unequal_prompts(pair):
    model, twin = pair
    prompts = [tokens_of(model, count, seed=count) for count in (3, 40, 17, 1, 64, 25)]
    engine = engine_of(model, max_batched_tokens=32)
    completions = engine.generate(prompts, SamplingParams(max_new_tokens=20, temperature=0))
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = torch.tensor([prompt])
        expected = twin.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False, eos_token_id=None
        )
        assert completion.token_ids == expected[0, len(prompt) :].tolist()
        assert completion.finish_reason == "length"
