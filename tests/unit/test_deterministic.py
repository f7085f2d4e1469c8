"""In deterministic mode a token's logits are bit-identical, however its sequence is batched, chunked and cached."""

from __future__ import annotations

import pytest
import torch

from llama_tp.config import EngineConfig
from llama_tp.engine.engine import Engine
from llama_tp.model_args import ModelArgs
from llama_tp.parallel.comm import SingleComm
from tests.tiny_model import random_model, runner_of
from tests.watched_request import PROMPT, logits_of

ARGS = ModelArgs(dim=288, n_layers=3, n_heads=6, n_kv_heads=2, vocab_size=512, multiple_of=32)
"""Wide enough for kernels to add up in different orders for different shapes."""
SITUATIONS = {
    "alone": ({}, []),
    "batched": ({}, [[9] * 200, [1, 2, 3], list(range(100))]),
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


def engine_of(model, dtype=torch.float32, **settings):
    config = EngineConfig(**{"max_seq_len": 256, "max_batch_size": 4, **settings})
    return Engine(runner_of(model, config, dtype=dtype), SingleComm(), config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_are_bit_identical_in_every_situation(model, dtype):
    expected = logits_of(engine_of(model, dtype, deterministic=True), [])
    plain = logits_of(engine_of(model, dtype), [])
    torch.testing.assert_close(expected[0], plain[0], atol=1e-4 if dtype == torch.float32 else 1.0, rtol=0)
    for name in SITUATIONS if dtype == torch.float32 else ("in chunks and company", "after a prefix hit"):
        settings, others = SITUATIONS[name]
        engine = engine_of(model, dtype, deterministic=True, **settings)
        logits = logits_of(engine, others)
        stats = engine.stats()
        assert (stats.preemptions > 0) == (name == "preempted")
        assert stats.prefix_hit_tokens > 0 or name != "after a prefix hit"
        assert torch.equal(logits, expected), name


def test_without_it_some_situation_changes_a_bit(model):
    """Else the test above would prove nothing."""
    expected = logits_of(engine_of(model), [])
    situations = (logits_of(engine_of(model, **settings), others) for settings, others in SITUATIONS.values())
    assert not all(torch.equal(logits, expected) for logits in situations)
