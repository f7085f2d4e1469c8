"""The engine scores a prompt as transformers does, however it is batched, chunked, preempted or cached."""

from __future__ import annotations

import math
import random

import pytest
import torch

from llama_tp.engine import scheduler as scheduler_module
from llama_tp.engine.request import FinishReason, Request
from llama_tp.engine.sampling_params import SamplingParams
from llama_tp.model.transformer import Transformer
from tests.tiny_model import MODELS, VARIANTS, engine_of, random_model, transformers_twin

pytestmark = pytest.mark.usefixtures("one_thread")

SCORE = SamplingParams(temperature=0, max_new_tokens=0, prompt_logprobs=3)
ORDINARY = SamplingParams(temperature=0, max_new_tokens=12)
PROMPTS = [[5, 6, 7], [9] * 33, [1], list(range(2, 90)), [44, 45] * 10]


@pytest.fixture(scope="module")
def model():
    return random_model(MODELS["gqa"])


@pytest.fixture(scope="module")
def scored(model):
    """Each prompt's log probabilities when nobody else is there."""
    return [engine_of(model).generate([prompt], SCORE)[0].prompt_logprobs for prompt in PROMPTS]


def oracle(model, prompt):
    """transformers' log probabilities of all tokens after each of the prompt's but the last: (P - 1, V)."""
    with torch.no_grad():
        return transformers_twin(model)(torch.tensor([prompt])).logits[0].double().log_softmax(-1)[:-1]


def chosen(scores):
    return pytest.approx([one.chosen for one in scores], abs=1e-4)


def values(scores):
    return [one.chosen for one in scores]


def drain(engine):
    events = []
    while engine.num_requests:
        events += engine.step()
    return events


def watch(engine):
    """The number of logits of each step from now on."""
    sizes = []
    execute = engine.runner.execute

    def watched(plan):
        logits = execute(plan)
        sizes.append(0 if logits is None else logits.size(0))
        return logits

    engine.runner.execute = watched
    return sizes


@pytest.mark.parametrize("name", [*MODELS, *VARIANTS])
def test_a_prompt_is_scored_as_transformers_does(name):
    model = random_model({**MODELS, **VARIANTS}[name])
    prompt = random.Random(name).choices(range(64), k=60)
    (done,) = engine_of(model, max_batched_tokens=23).generate([prompt], SCORE.but(prompt_logprobs=5))
    logs = oracle(model, prompt)
    assert (done.token_ids, done.finish_reason) == ([], FinishReason.LENGTH)
    assert len(done.prompt_logprobs) == 59
    for position, one in enumerate(done.prompt_logprobs):
        target = prompt[position + 1]
        assert one.chosen == pytest.approx(logs[position, target].item(), abs=1e-4)
        best, tokens = logs[position].topk(5)
        assert [token for token, _ in one.top] == tokens.tolist()
        assert [value for _, value in one.top] == pytest.approx(best.tolist(), abs=1e-4)
        assert one.rank == 1 + (logs[position] > logs[position, target]).sum().item()


@pytest.mark.parametrize(
    "settings",
    [{}, {"max_batched_tokens": 5}, {"page_size": 1}, {"max_batch_size": 1}, {"max_batch_size": 2}],
    ids=["at once", "in chunks", "pages of one token", "one by one", "in pairs"],
)
@pytest.mark.parametrize("most", [scheduler_module.MAX_SCORED, 7])
def test_neither_neighbours_nor_chunks_change_a_score_or_a_token(model, scored, settings, most, monkeypatch):
    monkeypatch.setattr(scheduler_module, "MAX_SCORED", most)
    params = [SCORE, ORDINARY, SCORE, SCORE.but(max_new_tokens=12), SCORE]
    alone = [engine_of(model).generate([prompt], ORDINARY)[0].token_ids for prompt in PROMPTS]
    done = engine_of(model, **settings).generate(PROMPTS, params)
    assert [one.token_ids for one in done] == [[], alone[1], [], alone[3], []]
    for index in (0, 2, 3, 4):
        assert values(done[index].prompt_logprobs) == chosen(scored[index])
    assert done[1].prompt_logprobs is None
    assert done[2].prompt_logprobs == [], "the first token of a prompt has no score"


def test_a_preempted_prompt_is_scored_once(model, scored):
    engine = engine_of(model, cache_pages=16, page_size=8, max_batched_tokens=8)
    sizes = watch(engine)
    engine.add(Request("old", tuple(range(20)), ORDINARY.but(max_new_tokens=100)))
    for _ in range(30):
        engine.step()
    del sizes[:]
    engine.add(Request("young", tuple(PROMPTS[3][:70]), SCORE))
    events = drain(engine)
    (event,) = (event for event in events if event.request_id == "young")
    assert engine.scheduler.num_preemptions > 0
    assert values(event.prompt_logprobs) == chosen(scored[3][:69])
    assert sum(sizes) == len(events) - 1 + 70, "a logit was computed twice"


def test_a_cached_prefix_is_scored_and_what_was_scored_is_cached(model, scored):
    engine = engine_of(model)
    (ordinary,) = engine.generate([PROMPTS[3]], ORDINARY)
    (again,) = engine.generate([PROMPTS[3]], SCORE)
    assert values(again.prompt_logprobs) == chosen(scored[3])
    assert engine.stats().prefix_hit_tokens == 0
    other = engine_of(model)
    other.generate([PROMPTS[3]], SCORE)
    assert other.generate([PROMPTS[3]], ORDINARY) == [ordinary]
    assert other.stats().prefix_hit_tokens == 80


def test_the_prompt_of_several_outputs_is_scored_once(model, scored):
    engine = engine_of(model)
    sizes = watch(engine)
    params = ORDINARY.but(n=3, prompt_logprobs=0)
    engine.add(Request("a", tuple(PROMPTS[3]), params))
    events = drain(engine)
    assert [event.prompt_logprobs is not None for event in events] == [True] + [False] * (len(events) - 1)
    assert values(events[0].prompt_logprobs) == chosen(scored[3])
    assert sum(sizes) == 87 + 3 * 12
    for one in engine_of(model).generate([PROMPTS[3]], params):
        assert values(one.prompt_logprobs) == chosen(scored[3])


def test_if_the_output_that_scores_is_cancelled_the_next_one_goes_on(model, scored):
    engine = engine_of(model, max_batched_tokens=20)
    engine.add(Request("a", tuple(PROMPTS[3]), ORDINARY.but(n=2, prompt_logprobs=0)))
    engine.step()
    assert engine.cancel("a", 0)
    events = drain(engine)
    assert {event.index for event in events} == {1}
    assert values(events[0].prompt_logprobs) == chosen(scored[3])


def test_a_prompt_may_fill_the_whole_context_if_nothing_is_generated(model):
    prompt = [5, 9] * 32
    engine = engine_of(model, max_seq_len=64, max_batch_size=1)
    (done,) = engine.generate([prompt], SCORE)
    logs = oracle(model, prompt).gather(-1, torch.tensor(prompt[1:]).unsqueeze(-1)).squeeze(-1)
    assert values(done.prompt_logprobs) == pytest.approx(logs.tolist(), abs=1e-4)
    with pytest.raises(ValueError, match="exceeds max_seq_len=64"):
        engine.generate([prompt], SCORE.but(max_new_tokens=1))


def test_scores_are_bit_identical_in_any_company_in_deterministic_mode(model):
    (alone,) = engine_of(model, deterministic=True).generate([PROMPTS[3]], SCORE)
    crowd = engine_of(model, deterministic=True, max_batched_tokens=37)
    assert crowd.generate(PROMPTS, [ORDINARY, ORDINARY, SCORE, SCORE, SCORE])[3] == alone
    plain = engine_of(model, max_batched_tokens=37).generate(PROMPTS, SCORE)
    assert plain[3] != alone, "otherwise this proves nothing"


def test_a_step_computes_no_more_logits_than_are_planned_for(model):
    engine = engine_of(model, max_seq_len=600, max_batch_size=4, max_batched_tokens=512)
    sizes = watch(engine)
    engine.generate([[7] * 500, [8] * 400, [9], [10]], [SCORE, SCORE, ORDINARY, ORDINARY])
    assert max(sizes) <= scheduler_module.MAX_SCORED + engine.config.max_batch_size
    assert sum(sizes) == 500 + 400 + 2 * 12


def test_numbers_that_are_not_finite_fail_their_own_request(model):
    twin = Transformer(model.args).requires_grad_(False)
    twin.load_state_dict(model.state_dict())
    twin.tok_embeddings.weight[100] = math.nan
    poisoned, neighbour = engine_of(twin, max_batched_tokens=8).generate([[5, 100, *range(20)], PROMPTS[4]], SCORE)
    assert (poisoned.finish_reason, poisoned.error) == (FinishReason.ERROR, "nan_logits")
    assert poisoned.prompt_logprobs is None
    (alone,) = engine_of(model).generate([PROMPTS[4]], SCORE)
    assert values(neighbour.prompt_logprobs) == chosen(alone.prompt_logprobs)


def test_logits_that_overflow_fail_the_request_even_if_the_last_ones_do_not(model):
    engine = engine_of(model)
    execute = engine.runner.execute

    def overflowing(plan):
        logits = execute(plan).clone()
        logits[1, 3] = math.inf
        return logits

    engine.runner.execute = overflowing
    (done,) = engine.generate([PROMPTS[0]], SCORE)
    assert (done.finish_reason, done.error, done.prompt_logprobs) == (FinishReason.ERROR, "nan_logits", None)


@pytest.mark.parametrize(("name", "value"), [("prompt_logprobs", -1), ("prompt_logprobs", 1.0), ("max_new_tokens", -1)])
def test_parameters_that_mean_nothing_are_refused(name, value):
    with pytest.raises(ValueError, match=f"^{name}={value} must be"):
        SamplingParams(**{"prompt_logprobs": 0, name: value})
