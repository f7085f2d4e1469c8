"""In deterministic mode a token's logits are the same to the bit, whoever shares its steps and however it got there."""

from __future__ import annotations

import pytest
import torch

from llama_tp.config import EngineConfig, ModelArgs
from llama_tp.engine.engine import Engine
from llama_tp.engine.request import Request
from llama_tp.engine.runner import ModelRunner
from llama_tp.engine.sampling_params import SamplingParams
from llama_tp.model.transformer import Transformer
from llama_tp.parallel.apply import localize
from llama_tp.parallel.comm import SingleComm
from tests.tiny_model import random_model

ARGS = ModelArgs(dim=288, n_layers=3, n_heads=6, n_kv_heads=2, vocab_size=512, multiple_of=32)
"""Wide enough for kernels to add up in different orders for different shapes."""
PROMPT = [(7 * i * i + 3) % 500 for i in range(150)]
GREEDY = SamplingParams(temperature=0, max_new_tokens=30)
SITUATIONS = {
    "alone": ({}, []),
    "in company": ({}, [[9] * 200, [1, 2, 3], list(range(100))]),
    "in chunks of 7": ({"max_batched_tokens": 7}, []),
    "in chunks and company": ({"max_batched_tokens": 23}, [[9] * 200, [1, 2, 3], list(range(100))]),
    "with pages of 3": ({"page_size": 3}, [[9] * 200]),
    "after a prefix hit": ({}, [PROMPT[:90]]),
    "preempted": ({"cache_pages": 18}, [[9] * 100, [8] * 100, list(range(100))]),
    "at the end of the cache": ({"max_seq_len": 192, "max_batch_size": 1}, []),
}


@pytest.fixture(scope="module")
def model():
    return random_model(ARGS)


def engine_of(model, dtype, **settings):
    config = EngineConfig(**{"max_seq_len": 256, "max_batch_size": 4, **settings})
    twin = Transformer(ARGS).requires_grad_(False)
    twin.load_state_dict(model.state_dict())
    runner = ModelRunner(
        localize(twin.to(dtype), SingleComm()), config, num_kv_heads=2, dtype=dtype, device=torch.device("cpu")
    )
    return Engine(runner, SingleComm(), config)


def logits_of(engine, others):
    """The logits that each token of PROMPT's continuation was sampled from."""
    seen = []
    sample = engine.sampler.sample

    def watch(logits, sequences):
        seen.extend(row.clone() for row, one in zip(logits, sequences, strict=True) if one.request.id == "watched")
        return sample(logits, sequences)

    engine.sampler.sample = watch
    for i, prompt in enumerate(others):
        engine.add(Request(f"other {i}", tuple(prompt), GREEDY.but(max_new_tokens=20 + i)))
    for _ in range(3 if others else 0):
        engine.step()
    engine.add(Request("watched", tuple(PROMPT), GREEDY))
    while engine.num_requests:
        engine.step()
    assert len(seen) == 30
    return torch.stack(seen), engine


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_are_equal_to_the_bit_in_every_situation(model, dtype):
    expected, _ = logits_of(engine_of(model, dtype, deterministic=True), [])
    plain, _ = logits_of(engine_of(model, dtype), [])
    torch.testing.assert_close(expected[0], plain[0], atol=1e-4 if dtype == torch.float32 else 1.0, rtol=0)
    for name in SITUATIONS if dtype == torch.float32 else ("in chunks and company", "after a prefix hit"):
        settings, others = SITUATIONS[name]
        logits, engine = logits_of(engine_of(model, dtype, deterministic=True, **settings), others)
        stats = engine.stats()
        assert (stats.preemptions > 0) == (name == "preempted")
        assert stats.prefix_hit_tokens > 0 or name != "after a prefix hit"
        assert torch.equal(logits, expected), name


def test_without_it_some_situation_changes_a_bit(model):
    """Else the test above would prove nothing."""
    expected, _ = logits_of(engine_of(model, torch.float32), [])
    situations = (
        logits_of(engine_of(model, torch.float32, **settings), others) for settings, others in SITUATIONS.values()
    )
    assert not all(torch.equal(logits, expected) for logits, _ in situations)
