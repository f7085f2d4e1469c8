"""Drafts change no token, no log probability and no end of any output: only the number of steps."""

from __future__ import annotations

import ctypes
import math
import random
from itertools import pairwise

import pytest
import torch

from llama_tp.config import EngineConfig
from llama_tp.engine import engine as engine_module
from llama_tp.engine import speculation as speculation_module
from llama_tp.engine.codec import decode
from llama_tp.engine.engine import Engine
from llama_tp.engine.request import FinishReason, Request
from llama_tp.engine.sampling_params import SamplingParams
from llama_tp.engine.step import Chunk, StepPlan
from llama_tp.model.transformer import Transformer
from tests.tiny_model import MODELS, engine_of, random_model, runner_of
from tests.unit.comm_doubles import RecordingComm

pytestmark = pytest.mark.usefixtures("one_thread")

GREEDY = SamplingParams(temperature=0, max_new_tokens=40)
SEEDED = SamplingParams(temperature=0.9, top_p=0.95, seed=3, max_new_tokens=40)
PROMPTS = [[5, 6, 7], [9] * 33, [1], list(range(2, 60)), [44, 45] * 10, [1, 2, 3, 4, 5, 6] * 5]
NAN_TOKEN = 100
"""A token of `model_with_nan` whose embedding is not a number."""
EVERYTHING = {
    "penalties": {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.2},
    "logit_bias": {"logit_bias": {7: 3.0, 9: -5.0}},
    "allowed_ids": {"allowed_ids": frozenset(range(3, 40))},
    "bad_words": {"bad_words": ((5, 6), (7,), (9, 9))},
    "logprobs": {"logprobs": 3},
    "prompt_logprobs": {"prompt_logprobs": 2},
    "min_new_tokens": {"min_new_tokens": 20, "stop_ids": frozenset(range(0, 128, 3))},
    "stop_ids": {"stop_ids": frozenset(range(0, 128, 17))},
    "n": {"n": 3},
}


@pytest.fixture(scope="module")
def model():
    return random_model(MODELS["gqa"])


@pytest.fixture(scope="module")
def model_with_nan(model):
    twin = Transformer(model.args).requires_grad_(False)
    twin.load_state_dict(model.state_dict())
    twin.tok_embeddings.weight[NAN_TOKEN] = math.nan
    return twin


def drafting_engine(model, **config):
    return engine_of(model, **{"speculative_tokens": 4, "speculative_max_batch": 4, **config})


class Prophet:
    """Predicts what will be generated, and is mistaken about one token in five."""

    def __init__(self, texts):
        self._texts, self._rng = texts, random.Random(1)

    def draft(self, tokens, most):
        text = next((text for text in self._texts if text[: len(tokens)] == tokens), tokens)
        return tuple(
            token if self._rng.random() < 0.8 else self._rng.randrange(96) for token in text[len(tokens) :][:most]
        )


@pytest.fixture
def foretell(monkeypatch):
    """Have the outputs of `prompts` predicted, most of their tokens correctly."""

    def foretell(prompts, completions):
        n = len(completions) // len(prompts)
        texts = [[*prompts[i // n], *one.token_ids] for i, one in enumerate(completions)]
        monkeypatch.setattr(speculation_module, "PromptLookup", lambda: Prophet(texts))

    return foretell


@pytest.mark.parametrize("params", [GREEDY, SEEDED], ids=["greedy", "seeded"])
@pytest.mark.parametrize("name", ["mha", "gqa", "tied"])
def test_prompts_that_repeat_get_the_same_tokens_from_fewer_steps(name, params):
    model = random_model(MODELS[name], seed=1)
    prompts = [[token % 64 for token in prompt] for prompt in PROMPTS]
    expected = engine_of(model).generate(prompts, params)
    engine = drafting_engine(model)
    assert engine.generate(prompts, params) == expected
    stats = engine.stats()
    assert stats.drafted_tokens >= stats.accepted_tokens > (10 if params is GREEDY else -1)


@pytest.mark.parametrize("params", [GREEDY, SEEDED], ids=["greedy", "seeded"])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"prefix_cache": False},
        {"max_batch_size": 1},
        {"page_size": 1},
        {"page_size": 3, "max_batched_tokens": 9},
        {"cache_pages": 14, "page_size": 8},
        {"speculative_tokens": 1},
        {"speculative_tokens": 30, "page_size": 4},
        {"deterministic": True},
    ],
    ids=str,
)
def test_neither_pages_nor_chunks_nor_preemption_let_a_draft_change_a_token(model, foretell, config, params):
    expected = engine_of(model).generate(PROMPTS, params)
    foretell(PROMPTS, expected)
    engine = drafting_engine(model, **config)
    assert engine.generate(PROMPTS, params) == expected
    stats = engine.stats()
    assert stats.accepted_tokens > 60
    assert (stats.preemptions > 0) is ("cache_pages" in config)
    assert (engine.num_requests, engine.scheduler.blocks.num_free) == (0, engine.config.num_pages)
    assert engine.sampler.is_idle
    assert engine.generate(PROMPTS, params) == expected, "what the first run left in the prefix cache is right"


@pytest.mark.parametrize("params", [GREEDY, SEEDED], ids=["greedy", "seeded"])
@pytest.mark.parametrize("feature", EVERYTHING)
def test_each_token_is_sampled_by_all_its_rules(model, foretell, feature, params):
    params = params.but(**EVERYTHING[feature])
    expected = engine_of(model).generate(PROMPTS, params)
    foretell(PROMPTS, expected)
    engine = drafting_engine(model)
    completions = engine.generate(PROMPTS, params)
    assert engine.stats().accepted_tokens > 10
    for one, other in zip(completions, expected, strict=True):
        assert (one.token_ids, one.finish_reason, one.error) == (other.token_ids, other.finish_reason, other.error)
        for kind in ("logprobs", "prompt_logprobs"):
            ours, theirs = getattr(one, kind), getattr(other, kind)
            assert (ours is None) is (theirs is None)
            for a, b in zip(ours or (), theirs or (), strict=True):
                assert a.chosen == pytest.approx(b.chosen, abs=1e-4)
                assert [token for token, _ in a.top] == [token for token, _ in b.top]


class Alternating:
    """A grammar: even and odd token ids, in turn."""

    num_tokens = 128
    has_failed = False

    def __init__(self):
        self.last = 1

    def start(self):
        return Alternating()

    def accept(self, token_id):
        self.last = token_id

    def fill_mask(self, address, num_bytes):
        ctypes.memset(address, 0b01010101 if self.last % 2 else 0b10101010, num_bytes)


@pytest.mark.parametrize("params", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_a_grammar_rules_each_token_of_a_step(model, monkeypatch, params):
    def run(engine):
        engine.add(Request("r", (1, 2, 3), params, Alternating()))
        events = []
        while engine.num_requests:
            events += engine.step()
        return [event.token_id for event in events]

    expected = run(engine_of(model))
    assert all((one + other) % 2 for one, other in pairwise(expected))
    monkeypatch.setattr(speculation_module, "PromptLookup", lambda: Prophet([[1, 2, 3, *expected]]))
    engine = drafting_engine(model)
    assert run(engine) == expected
    assert engine.stats().accepted_tokens > 15


def steps(engine):
    """The tokens of each step, until nothing is left to do."""
    while engine.num_requests:
        yield [event.token_id for event in engine.step()]


def test_right_drafts_come_as_several_tokens_of_one_step_and_are_counted(model, monkeypatch):
    (alone,) = engine_of(model).generate([[5, 6, 7]], GREEDY)
    monkeypatch.setattr(Prophet, "draft", lambda self, tokens, most: tuple(alone.token_ids[len(tokens) - 3 :][:most]))
    monkeypatch.setattr(speculation_module, "PromptLookup", lambda: Prophet([]))
    engine = drafting_engine(model)
    execute, seconds = engine.runner.execute, []
    monkeypatch.setattr(engine.runner, "execute", lambda plan: seconds.append(1.0) or execute(plan))
    monkeypatch.setattr(engine_module, "monotonic", lambda: sum(seconds))
    engine.add(Request("r", (5, 6, 7), GREEDY))
    found = list(steps(engine))
    assert [len(tokens) for tokens in found] == [5] * 8
    assert [token for tokens in found for token in tokens] == alone.token_ids
    stats = engine.stats()
    assert (stats.drafted_tokens, stats.accepted_tokens, stats.tokens_out) == (32, 32, 40)
    assert (sum(stats.step_seconds.counts), stats.step_seconds.total) == (8, 8.0)
    assert (sum(stats.inter_token_seconds.counts), stats.inter_token_seconds.total) == (39, 7.0)


@pytest.mark.parametrize("max_new_tokens", [1, 2, 3, 7, 11])
def test_max_new_tokens_and_a_stop_id_end_an_output_inside_a_right_draft(model, monkeypatch, max_new_tokens):
    (alone,) = engine_of(model).generate([[5, 6, 7]], GREEDY)
    monkeypatch.setattr(Prophet, "draft", lambda self, tokens, most: tuple(alone.token_ids[len(tokens) - 3 :][:most]))
    monkeypatch.setattr(speculation_module, "PromptLookup", lambda: Prophet([]))
    engine = drafting_engine(model)
    (cut,) = engine.generate([[5, 6, 7]], GREEDY.but(max_new_tokens=max_new_tokens))
    assert (cut.token_ids, cut.finish_reason) == (alone.token_ids[:max_new_tokens], FinishReason.LENGTH)
    stop = alone.token_ids[max_new_tokens]
    (stopped,) = engine.generate([[5, 6, 7]], GREEDY.but(stop_ids=frozenset({stop})))
    first = alone.token_ids.index(stop)
    assert (stopped.token_ids, stopped.finish_reason) == (alone.token_ids[:first], FinishReason.STOP)
    assert engine.sampler.is_idle


def test_a_sequence_may_fill_the_context_to_the_last_token(model):
    prompt = [1, 2, 3, 4, 5] * 4
    engine = drafting_engine(model, max_seq_len=32, page_size=8, max_batch_size=1)
    params = GREEDY.but(max_new_tokens=12)
    assert engine.generate([prompt] * 2, params) == engine_of(model).generate([prompt] * 2, params)


def test_one_that_is_cancelled_in_mid_way_frees_everything_and_changes_no_neighbour(model, foretell):
    expected = engine_of(model).generate(PROMPTS[:3], SEEDED)
    foretell(PROMPTS[:3], expected)
    engine = drafting_engine(model)
    for index, prompt in enumerate(PROMPTS[:3]):
        engine.add(Request(str(index), tuple(prompt), SEEDED))
    events = [*engine.step(), *engine.step()]
    assert engine.cancel("1")
    while engine.num_requests:
        events += engine.step()
    for index in (0, 2):
        assert [event.token_id for event in events if event.request_id == str(index)] == expected[index].token_ids
    assert engine.scheduler.blocks.num_free == engine.config.num_pages
    assert engine.sampler.is_idle


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_wrong_draft_whose_hidden_state_is_not_finite_does_no_harm(model_with_nan, monkeypatch, deterministic):
    """Neither to the tokens before it in the same step, nor to those that are later computed in its place."""
    params = GREEDY.but(logit_bias={NAN_TOKEN: -1000})
    expected = engine_of(model_with_nan).generate(PROMPTS[:3], params)
    texts = [[*prompt, *one.token_ids] for prompt, one in zip(PROMPTS, expected, strict=False)]

    def draft(self, tokens, most):
        text = next(text for text in texts if text[: len(tokens)] == tokens)
        return (*text[len(tokens) :][: most - 2], NAN_TOKEN, 5)[:most]

    monkeypatch.setattr(Prophet, "draft", draft)
    monkeypatch.setattr(speculation_module, "PromptLookup", lambda: Prophet([]))
    engine = drafting_engine(model_with_nan, deterministic=deterministic)
    assert engine.generate(PROMPTS[:3], params) == expected
    assert engine.stats().accepted_tokens > 40


def test_a_token_that_is_not_finite_ends_the_output_where_it_is_sampled(model_with_nan, monkeypatch):
    """As without a draft: the tokens that were sampled before it, and the one after which no other can be."""
    params = GREEDY.but(allowed_ids=frozenset({NAN_TOKEN}))
    monkeypatch.setattr(Prophet, "draft", lambda self, tokens, most: (NAN_TOKEN,) * most)
    monkeypatch.setattr(speculation_module, "PromptLookup", lambda: Prophet([]))
    engine = drafting_engine(model_with_nan)
    expected = engine_of(model_with_nan).generate([[5, 6, 7]], params)
    assert engine.generate([[5, 6, 7]], params) == expected
    assert (expected[0].token_ids, expected[0].error) == ([NAN_TOKEN], "nan_logits")


@pytest.mark.parametrize("bad_at", [3, 4, 5])
def test_logits_depend_on_what_is_not_finite_before_them_until_it_is_computed_anew(model_with_nan, bad_at):
    runner = engine_of(model_with_nan).runner
    tokens = [1, 2, 3, 4, 5, 6]
    tokens[bad_at] = NAN_TOKEN
    drafted = runner.execute(StepPlan(1, (Chunk(0, 0, tuple(tokens), 4),), ((0, 0, 0),)))
    assert drafted.isnan().any(dim=-1).tolist() == [at >= bad_at for at in range(2, 6)]
    assert runner.execute(StepPlan(2, (Chunk(0, bad_at + 1, (7,), 1),))).isnan().any(), "the bad one is still there"
    again = runner.execute(StepPlan(3, (Chunk(0, bad_at, (7,), 1),)))
    whole = runner.execute(StepPlan(3, (Chunk(1, 0, (*tokens[:bad_at], 7), 1),), ((1, 0, 1),)))
    torch.testing.assert_close(again, whole, atol=1e-5, rtol=0)
    after = runner.execute(StepPlan(4, (Chunk(0, bad_at + 1, (NAN_TOKEN,), 0), Chunk(1, bad_at + 1, (8,), 1))))
    assert not after.isnan().any()
    assert runner.execute(StepPlan(5, (Chunk(0, bad_at + 2, (9,), 1),))).isnan().any()


def test_in_deterministic_mode_logits_are_bit_identical_with_drafts(model, foretell):
    def logits_of(engine):
        seen = {}
        sample = engine.sampler.sample

        def watch(logits, sequences):
            for row, one in zip(logits, sequences, strict=True):
                seen[one.request.id, one.num_generated] = row.clone()
            return sample(logits, sequences)

        engine.sampler.sample = watch
        engine.generate(PROMPTS, GREEDY)
        return seen

    foretell(PROMPTS, engine_of(model, deterministic=True).generate(PROMPTS, GREEDY))
    expected = logits_of(engine_of(model, deterministic=True))
    engine = drafting_engine(model, deterministic=True)
    found = logits_of(engine)
    assert engine.stats().accepted_tokens > 60
    assert len(expected) == 40 * len(PROMPTS)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], row) for key, row in expected.items())


def test_a_follower_that_hears_the_plans_computes_the_drafts_too(model, foretell):
    foretell(PROMPTS, engine_of(model).generate(PROMPTS, GREEDY))
    config = EngineConfig(max_seq_len=128, max_batch_size=4, speculative_tokens=4, speculative_max_batch=4)
    comm = RecordingComm()
    leader = Engine(runner_of(model, config), comm, config)
    follower = runner_of(model, config)
    for index, prompt in enumerate(PROMPTS):
        leader.add(Request(str(index), tuple(prompt), GREEDY))
    while leader.num_requests:
        leader.step()
        follower.execute(decode(comm.messages[-1]))
        assert torch.equal(follower.cache._data, leader.runner.cache._data)
    assert leader.stats().accepted_tokens > 60


def test_nothing_is_drafted_unless_it_is_asked_for(model):
    engine = engine_of(model)
    engine.generate(PROMPTS, GREEDY)
    assert (engine.stats().drafted_tokens, engine.stats().accepted_tokens) == (0, 0)
