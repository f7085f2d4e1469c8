"""While a step computes, every rank lays out the next one. Whether the guess was right changes nothing but time."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import llama_tp
from llama_tp.engine.request import Request
from llama_tp.engine.sampling_params import SamplingParams
from llama_tp.engine.step import Chunk, StepPlan
from tests.tiny_model import MODELS, engine_of, random_model

GREEDY = SamplingParams(temperature=0, max_new_tokens=24)
EVERYTHING = SamplingParams(
    temperature=0.8,
    top_p=0.9,
    top_k=50,
    min_p=0.01,
    repetition_penalty=1.1,
    presence_penalty=0.1,
    logit_bias={3: 1.0},
    min_new_tokens=20,
    stop_ids=frozenset({5}),
    seed=1,
    logprobs=2,
    max_new_tokens=24,
)
WAITING = {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "equal", "unique"}
"""Operators whose result the host has to know before it can go on."""


@pytest.fixture(scope="module")
def model():
    return random_model(MODELS["gqa"])


def log_calls(engine):
    """What happens in which order from now on: prepare, compute, sample."""
    calls = []

    def log(name, function):
        def logged(*args):
            calls.append(name)
            return function(*args)

        return logged

    engine.runner.prepare = log("prepare", engine.runner.prepare)
    engine.runner.model.forward = log("compute", engine.runner.model.forward)
    engine.sampler.sample = log("sample", engine.sampler.sample)
    return calls


@pytest.mark.parametrize("deterministic", [False, True])
def test_between_two_steps_of_decoding_nothing_is_laid_out(model, deterministic):
    """A page is full every second step: the next one was told of in time."""
    engine = engine_of(model, page_size=4, deterministic=deterministic)
    calls = log_calls(engine)
    for index in range(2):
        engine.add(Request(str(index), (1,) * (7 + 2 * index), GREEDY))
    engine.step()
    assert (calls.pop(0), calls.pop(0)) == ("prepare", "compute")
    for _ in range(22):
        engine.step()
    assert calls == [*["prepare", "sample", "compute"] * 22, "prepare", "sample"]


def test_who_joins_or_leaves_is_laid_out_once_more(model):
    engine = engine_of(model)
    calls = log_calls(engine)
    engine.add(Request("a", (1, 2), GREEDY))
    engine.step()
    del calls[:]
    engine.add(Request("b", (1, 2, 3), GREEDY))
    engine.step()
    assert calls == ["prepare", "compute", "prepare", "sample"]
    del calls[:]
    engine.step()
    assert calls == ["compute", "prepare", "sample"]
    del calls[:]
    engine.cancel("a")
    engine.step()
    assert calls == ["prepare", "compute", "prepare", "sample"]


def test_a_place_that_now_belongs_to_another_sequence_is_not_the_guessed_one(model):
    """The new one has found its first page in the cache, and computes one token where the old one would have."""
    runner = engine_of(model, page_size=4).runner
    runner.execute(StepPlan(1, (Chunk(1, 0, (9, 8, 7, 6), 1),), ((1, 0, 5),)))
    runner.execute(StepPlan(2, (Chunk(0, 0, (1, 2, 3, 4), 1),), ((0, 0, 0), (0, 1, 1))))
    logits = runner.execute(StepPlan(3, (Chunk(0, 4, (5,), 1),), ((0, 0, 5), (0, 1, 6)), freed=(0, 1)))
    whole = StepPlan(1, (Chunk(2, 0, (9, 8, 7, 6, 5), 1),), ((2, 0, 3), (2, 1, 4)))
    torch.testing.assert_close(logits, engine_of(model, page_size=4).runner.execute(whole), atol=1e-5, rtol=0)


def test_no_tensor_of_host_values_is_made_on_the_device():
    """torch.tensor(values, device=...) waits for all that a GPU has to do; .to(device, non_blocking=True) does not."""
    package = Path(llama_tp.__file__).parent
    for path in (*package.glob("engine/*.py"), *package.glob("model/*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.tensor", "torch.as_tensor"):
                assert "device" not in [word.arg for word in node.keywords], f"{path}:{node.lineno}"


def test_a_step_makes_the_host_wait_for_the_device_once(model, monkeypatch):
    """For the sampled ids, and what else was asked for travels with them. On a GPU every other wait would idle it."""
    engine = engine_of(model)
    engine.runner._nonfinite._are_all_finite = False  # as on a GPU
    engine.add(Request("greedy", (1, 2, 3), GREEDY))
    engine.add(Request("everything", (4, 5), EVERYTHING))
    engine.step()
    copies, waits = [], []
    to_list = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: copies.append(tensor.shape) or to_list(tensor))

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            waits.extend({func.overloadpacket.__name__} & WAITING)
            return func(*args, **(kwargs or {}))

    with Watch():
        for _ in range(5):
            engine.step()
        assert waits == []
        assert len(copies) == 5
        assert bool(torch.ones(1).any())
        assert len(waits) == 1, "the watch sleeps"
