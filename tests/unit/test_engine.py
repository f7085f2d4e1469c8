"""The engine gives every request the tokens that it would get alone, whatever its neighbours do."""

from __future__ import annotations

import math
import time
from functools import partial

import pytest
import torch

from llama_tp.config import EngineConfig
from llama_tp.config_error import ConfigError
from llama_tp.engine import engine as engine_module
from llama_tp.engine.codec import decode
from llama_tp.engine.engine import Engine, GroupDiverged
from llama_tp.engine.request import FinishReason, Request
from llama_tp.engine.sampling_params import SamplingParams
from llama_tp.engine.scheduler import QueueFull
from llama_tp.model.attention.planner import SdpaCosts
from llama_tp.model.attention.sdpa import SdpaBackend, SdpaStep
from llama_tp.model.transformer import Transformer
from tests.tiny_model import MODELS, engine_of, random_model, runner_of
from tests.unit.comm_doubles import RecordingComm, ReplayingComm

pytestmark = pytest.mark.usefixtures("one_thread")

GREEDY = SamplingParams(temperature=0, max_new_tokens=12)
PROMPTS = [[5, 6, 7], [9] * 33, [1], list(range(2, 90)), [44, 45] * 10]
NAN_TOKEN = 100
"""A token of `model_with_nan` whose embedding is not a number: whoever feeds it gets NaN in cache and logits."""


@pytest.fixture(scope="module")
def model():
    return random_model(MODELS["gqa"])


@pytest.fixture(scope="module")
def model_with_nan(model):
    twin = Transformer(model.args).requires_grad_(False)
    twin.load_state_dict(model.state_dict())
    twin.tok_embeddings.weight[NAN_TOKEN] = math.nan
    return twin


@pytest.fixture(scope="module")
def alone(model):
    """What each prompt is continued with when nobody else is there."""
    return [engine_of(model).generate([prompt], GREEDY)[0] for prompt in PROMPTS]


def drain(engine):
    """Step until all requests have ended: the tokens and the last event of each."""
    tokens: dict[str, list[int]] = {}
    last = {}
    while engine.num_requests:
        for event in engine.step():
            assert event.request_id not in last, "an event after the end"
            tokens.setdefault(event.request_id, [])
            if event.token_id is not None:
                tokens[event.request_id].append(event.token_id)
            if event.finish_reason is not None:
                last[event.request_id] = event
    return tokens, last


def is_clean(engine):
    return (
        engine.num_requests == 0
        and engine.scheduler.blocks.num_free == engine.config.num_pages
        and engine.sampler.is_idle
    )


def test_prompts_of_any_lengths_together_get_the_tokens_that_they_get_alone(model, alone):
    engine = engine_of(model)
    assert engine.generate(PROMPTS, GREEDY) == alone
    assert is_clean(engine)
    assert {len(completion.token_ids) for completion in alone} == {12}
    assert len({tuple(completion.token_ids) for completion in alone}) == len(PROMPTS)


@pytest.mark.parametrize(
    "settings", [{"max_batched_tokens": 5}, {"page_size": 1}, {"max_batch_size": 1}, {"page_size": 7}]
)
def test_neither_chunks_nor_pages_nor_the_batch_size_change_a_token(model, alone, settings):
    assert engine_of(model, **settings).generate(PROMPTS, GREEDY) == alone


def test_the_same_engine_gives_the_same_tokens_again(model, alone):
    engine = engine_of(model)
    assert engine.generate(PROMPTS, GREEDY) == engine.generate(PROMPTS, GREEDY) == alone


def test_a_seeded_request_draws_the_same_tokens_alone_and_batched(model):
    params = [SamplingParams(temperature=0.9, top_p=0.95, seed=seed, max_new_tokens=12) for seed in range(len(PROMPTS))]
    solo = [engine_of(model).generate([prompt], one)[0] for prompt, one in zip(PROMPTS, params, strict=True)]
    assert engine_of(model).generate(PROMPTS, params) == solo
    mixed = [params[0], GREEDY, params[2], SamplingParams(seed=None, max_new_tokens=3), params[4]]
    together = engine_of(model, max_batched_tokens=16).generate(PROMPTS, mixed)
    assert [together[i] for i in (0, 2, 4)] == [solo[i] for i in (0, 2, 4)]


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "seeded"])
@pytest.mark.parametrize("costs", [SdpaCosts(gather_bytes=0), SdpaCosts()], ids=["read in place", "gathered"])
def test_sharing_a_prefix_changes_no_token(model, monkeypatch, costs, sampled):
    shared_calls = []
    attend = SdpaStep._attend_ranges
    monkeypatch.setattr(SdpaStep, "_attend_ranges", lambda *args: shared_calls.append(args[-1]) or attend(*args))
    params = SamplingParams(temperature=0.9 if sampled else 0, seed=3, max_new_tokens=30)
    prefix = list(range(2, 50))
    prompts = [[*prefix[:40], 5], [*prefix, 6, 7], [*prefix, 8], [9, 9], [*prefix[:40], *range(60, 70)]]
    expected = [engine_of(model).generate([prompt], params)[0] for prompt in prompts]
    engine = engine_of(model, max_batch_size=5, make_backend=partial(SdpaBackend, costs=costs))
    engine.generate([[*prefix, 1]], GREEDY)
    assert engine.generate(prompts, params) == expected
    assert engine.stats().prefix_hit_tokens > 100
    assert any(call.tokens.stop - call.tokens.start > 1 for call in shared_calls) is (costs.gather_bytes == 0)


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "seeded"])
def test_preemption_changes_no_token(model, sampled):
    params = SamplingParams(temperature=0.9 if sampled else 0, seed=3, max_new_tokens=40)
    prompts = [[5, 6, 7] * 8, [9] * 20, [1], list(range(2, 42))]
    engine = engine_of(model, cache_pages=11, page_size=8)  # any one of them fits
    completions = engine.generate(prompts, params)
    assert engine.scheduler.num_preemptions > 2
    assert completions == engine_of(model).generate(prompts, params)
    assert is_clean(engine)


def test_a_stop_id_ends_a_sequence_and_is_not_part_of_it(model, alone):
    ids = alone[0].token_ids
    stop = ids[6]
    first = ids.index(stop)
    params = [GREEDY.but(stop_ids=frozenset({stop})), GREEDY]
    stopped, neighbour = engine_of(model).generate(PROMPTS[:2], params)
    assert (stopped.token_ids, stopped.finish_reason) == (ids[:first], FinishReason.STOP)
    assert neighbour == alone[1]


def test_a_stop_id_may_be_the_first_token(model, alone):
    params = GREEDY.but(stop_ids=frozenset(alone[0].token_ids[:1]), max_new_tokens=1)
    (completion,) = engine_of(model).generate(PROMPTS[:1], params)
    assert (completion.token_ids, completion.finish_reason) == ([], FinishReason.STOP)


def test_a_sequence_may_fill_the_context_to_the_last_token(model):
    prompt = list(range(20))
    roomy = engine_of(model, max_seq_len=128).generate([prompt], GREEDY)
    engine = engine_of(model, max_seq_len=32, page_size=8)
    assert engine.generate([prompt] * 4, GREEDY) == roomy * 4
    assert engine.generate([list(range(31))], GREEDY.but(max_new_tokens=1))[0].finish_reason is FinishReason.LENGTH
    with pytest.raises(ValueError, match=r"prompts\[0\]: .*max_seq_len=32"):
        engine.generate([prompt], GREEDY.but(max_new_tokens=13))
    assert is_clean(engine)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ([], "prompt is empty"),
        ([1, 128], "token id 128 is outside the vocabulary of 128"),
        ([-1], "token id -1"),
        ([1, 1.7], "token id 1.7 must be an integer"),
        ("ab", "token id 'a' must be an integer"),
        ([1] * 117, "prompt of 117 tokens"),
    ],
    ids=["empty", "too high", "negative", "fraction", "text", "too long"],
)
def test_a_prompt_that_can_never_run_is_named_and_nothing_is_left_behind(model, alone, prompt, words):
    engine = engine_of(model)
    with pytest.raises(ValueError, match=rf"^prompts\[2\]: .*{words}"):
        engine.generate([PROMPTS[0], PROMPTS[1], prompt, [-5]], GREEDY)
    assert is_clean(engine)
    assert engine.generate(PROMPTS, GREEDY) == alone


def test_what_was_interrupted_leaves_nothing_behind(model, alone, monkeypatch):
    engine = engine_of(model)

    def interrupted(_plan):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "execute", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.generate(PROMPTS, GREEDY)
    assert is_clean(engine)
    assert engine.generate(PROMPTS, GREEDY) == alone


def test_prompts_may_be_tensors(model, alone):
    assert engine_of(model).generate([torch.tensor(PROMPTS[0]), torch.tensor(PROMPTS[1]).numpy()], GREEDY) == alone[:2]


def test_generate_does_not_mix_with_requests_that_were_added(model):
    engine = engine_of(model)
    engine.add(Request("0", (1,), GREEDY))
    with pytest.raises(RuntimeError, match="1 requests were added and have not ended"):
        engine.generate(PROMPTS, GREEDY)
    assert len(drain(engine)) > 0


@pytest.mark.parametrize("num_params", [1, 3])
def test_parameters_for_another_number_of_prompts_leave_nothing_behind(model, alone, num_params):
    """The prompts that were queued before it was noticed stayed, and the next call found their ids in use."""
    engine = engine_of(model)
    with pytest.raises(ValueError):  # noqa: PT011
        engine.generate(PROMPTS[:2], [GREEDY] * num_params)
    assert engine.generate(PROMPTS[:2], GREEDY) == alone[:2]


def test_no_prompts_make_no_completions(model):
    assert engine_of(model).generate([], GREEDY) == []


@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("page_size", [16, 4])
def test_a_nonfinite_request_leaves_its_neighbours_token_identical(model, model_with_nan, at, page_size):
    """Its keys and values are NaN too, and NaN in a slot that is merely hidden reaches whoever reads it."""
    healthy = [[5, 6, 7], [9] * 33]
    prompts = [*healthy[:at], [NAN_TOKEN] * 20, *healthy[at:]]
    expected = engine_of(model).generate(healthy, GREEDY)
    engine = engine_of(model_with_nan, page_size=page_size)
    completions = engine.generate(prompts, GREEDY)
    nonfinite = completions.pop(at)
    assert (nonfinite.token_ids, nonfinite.finish_reason) == ([], FinishReason.ERROR)
    assert nonfinite.error == "nan_logits"
    assert completions == expected
    assert is_clean(engine)


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_nonfinite_prompt_does_no_harm_while_it_is_read_in_chunks_beside_others(model, model_with_nan, at):
    """In a cache so tight that the pages of one lie where another's attention looks past its own end."""
    healthy = [list(range(2, 39)), [5, 6, 7]]
    prompts = [*healthy[:at], [NAN_TOKEN] + [9] * 60, *healthy[at:]]
    expected = engine_of(model).generate(healthy, GREEDY)
    engine = engine_of(model_with_nan, cache_pages=32, page_size=4, max_batched_tokens=6)
    completions = engine.generate(prompts, GREEDY)
    assert completions.pop(at).error == "nan_logits"
    assert completions == expected
    assert is_clean(engine)


def test_pages_of_a_nonfinite_request_do_no_harm_to_whoever_gets_them_next(model, model_with_nan):
    engine = engine_of(model_with_nan)
    nonfinite = engine.generate([[NAN_TOKEN] * 100] * 4, GREEDY)
    assert {completion.error for completion in nonfinite} == {"nan_logits"}
    assert engine.generate(PROMPTS[:3], GREEDY) == engine_of(model).generate(PROMPTS[:3], GREEDY)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_request_whose_logits_go_bad_in_mid_stream_ends_alone(model, alone, bad):
    engine = engine_of(model)
    execute, num_steps = engine.runner.execute, 0

    def execute_badly(plan):
        nonlocal num_steps
        num_steps += 1
        logits = execute(plan).clone()
        if num_steps == 5:
            logits[1, 17] = bad
        return logits

    engine.runner.execute = execute_badly
    completions = engine.generate(PROMPTS[:3], GREEDY)
    assert completions[1].token_ids == alone[1].token_ids[:4]
    assert (completions[1].finish_reason, completions[1].error) == (FinishReason.ERROR, "nan_logits")
    assert [completions[0], completions[2]] == [alone[0], alone[2]]
    assert is_clean(engine)


def test_cancelling_in_mid_way_frees_everything_and_changes_no_neighbour(model, alone):
    engine = engine_of(model)
    engine.add(Request("stays", tuple(PROMPTS[0]), GREEDY))
    engine.add(Request("leaves", tuple(PROMPTS[1]), SamplingParams(seed=1, max_new_tokens=90)))
    head = [event.token_id for _ in range(4) for event in engine.step() if event.request_id == "stays"]
    assert engine.cancel("leaves") is True
    assert engine.cancel("leaves") is False
    assert engine.scheduler.blocks.num_free == engine.config.num_pages - 1
    tokens, last = drain(engine)
    assert head + tokens["stays"] == alone[0].token_ids
    assert last.keys() == {"stays"}
    assert is_clean(engine)


@pytest.mark.parametrize("prefix_cache", [False, True])
@pytest.mark.parametrize("params", [GREEDY, SamplingParams(seed=7, max_new_tokens=12)], ids=["greedy", "seeded"])
def test_n_outputs_are_those_of_n_requests_and_compute_their_prompt_once(model, prefix_cache, params):
    prompts = [list(range(2, 90)), [9] * 33]
    seeds = [None] * 3 if params.is_greedy else range(7, 10)
    solo = [engine_of(model).generate([prompt], params.but(seed=seed))[0] for prompt in prompts for seed in seeds]
    engine = engine_of(model, prefix_cache=prefix_cache, max_batched_tokens=32)
    assert engine.generate(prompts, params.but(n=3)) == solo
    assert engine.stats().prefix_hit_tokens == 2 * 80 + 2 * 32, "full pages, for the second and third"
    assert is_clean(engine)


def test_cancelling_one_of_n_outputs_requests_frees_all_of_them(model):
    engine = engine_of(model, max_batch_size=2)
    for steps in range(4):  # before the first has forked, and after
        engine.add(Request("a", (1, 2, 3), SamplingParams(n=5, seed=1, max_new_tokens=50)))
        for _ in range(steps):
            engine.step()
        assert engine.cancel("a")
        assert is_clean(engine)


def test_an_output_that_ends_early_leaves_its_siblings_to_go_on(model):
    params = SamplingParams(seed=3, n=4, max_new_tokens=30)
    whole = engine_of(model).generate([[5, 6, 7]], params)
    stop = whole[0].token_ids[4]
    cut = engine_of(model).generate([[5, 6, 7]], params.but(stop_ids=frozenset({stop})))
    for before, after in zip(whole, cut, strict=True):
        end = before.token_ids.index(stop) if stop in before.token_ids else 30
        assert after.token_ids == before.token_ids[:end]


def test_more_prompts_than_may_wait_are_all_continued(model, alone):
    engine = engine_of(model, max_batch_size=1, max_waiting=1)
    assert engine.generate(PROMPTS, GREEDY) == alone
    engine.add(Request("a", (1,), GREEDY))
    with pytest.raises(QueueFull, match="1 outputs are already waiting, and n=1 more would exceed max_waiting=1"):
        engine.add(Request("b", (1,), GREEDY))
    engine.step()
    engine.add(Request("b", (1,), GREEDY))


def test_logprobs_come_with_every_token(model):
    plain, asked = engine_of(model).generate([PROMPTS[0]] * 2, [GREEDY, GREEDY.but(logprobs=2)])
    assert plain.logprobs is None
    assert asked.token_ids == plain.token_ids
    assert [one.top[0] for one in asked.logprobs] == [
        (token, one.chosen) for token, one in zip(asked.token_ids, asked.logprobs, strict=True)
    ], "greedy takes the most probable one"
    assert all(0 > one.top[0][1] > one.top[1][1] for one in asked.logprobs)


@pytest.mark.parametrize("name", ["stop_ids", "logit_bias"])
def test_an_id_outside_the_vocabulary_never_reaches_a_neighbour_s_logits(model, name):
    """In flat logits, column 128 of one row is column 0 of the next."""
    value = frozenset({128}) if name == "stop_ids" else {128: -100.0}
    with pytest.raises(ValueError, match=f"{name}: token id 128 is outside the vocabulary of 128"):
        engine_of(model).generate(PROMPTS[:2], GREEDY.but(min_new_tokens=2, **{name: value}))


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_request_that_rules_out_every_token_ends_alone(model, alone, temperature):
    """It was given id 0, for ever."""
    every = GREEDY.but(stop_ids=frozenset(range(128)), min_new_tokens=5, temperature=temperature, seed=1)
    engine = engine_of(model)
    stuck, *others = engine.generate([PROMPTS[0], *PROMPTS], [every, *[GREEDY] * len(PROMPTS)])
    assert (stuck.token_ids, stuck.finish_reason) == ([], FinishReason.ERROR)
    assert others == alone


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"repetition_penalty": 1e-40}, r"repetition_penalty=1e-40 must be in \[0.01, 100\]"),
        ({"presence_penalty": -1e39}, r"presence_penalty=-1e\+39 must be in \[-1000, 1000\]"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty=nan must be in"),
        ({"logit_bias": {5: 1e39}}, "logit_bias={5: 1e.39} must be numbers in"),
    ],
)
def test_what_float32_could_not_hold_is_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        SamplingParams(**settings)


def test_a_minimum_length_is_kept_against_a_stop_id(model, alone):
    stops = frozenset(alone[0].token_ids)
    params = GREEDY.but(stop_ids=stops, min_new_tokens=5)
    (completion,) = engine_of(model).generate(PROMPTS[:1], params)
    assert len(completion.token_ids) >= 5
    assert not stops & set(completion.token_ids)


def of_one_second_each(engine, monkeypatch):
    """Let the engine's steps take a second each, and nothing else any time."""
    execute, seconds = engine.runner.execute, []
    monkeypatch.setattr(engine.runner, "execute", lambda plan: seconds.append(1.0) or execute(plan))
    monkeypatch.setattr(engine_module, "monotonic", lambda: sum(seconds))


def test_the_statistics_are_those_of_what_was_done(model, monkeypatch):
    engine = engine_of(model, max_batch_size=2)
    of_one_second_each(engine, monkeypatch)
    for i in range(3):
        engine.add(Request(str(i), (1, 2, 3), GREEDY))
    engine.step()
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.pages_used, stats.tokens_out) == (2, 1, 2, 2)
    drain(engine)
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.pages_used) == (0, 0, 0)
    assert (stats.prompt_tokens, stats.tokens_out, stats.pages_total) == (9, 36, engine.config.num_pages)
    assert (sum(stats.step_seconds.counts), stats.step_seconds.total) == (24, 24.0)
    assert sum(stats.inter_token_seconds.counts) == 36 - 3, "all but the first of each"
    assert stats.inter_token_seconds.total == 36 - 3
    assert (sum(stats.queue_seconds.counts), stats.queue_seconds.total) == (3, 12.0)


def test_a_stop_id_is_no_token_and_has_no_inter_token_time(model, alone):
    *before, stop = alone[0].token_ids[:4]
    assert stop not in before
    engine = engine_of(model)
    (completion,) = engine.generate(PROMPTS[:1], GREEDY.but(stop_ids=frozenset({stop})))
    assert completion.token_ids == before
    assert sum(engine.stats().inter_token_seconds.counts) == len(before) - 1


def test_the_queue_time_of_a_request_begins_when_it_arrived(model):
    engine = engine_of(model)
    engine.add(Request("a", (1, 2, 3), GREEDY), arrival=time.monotonic() - 7.0)
    engine.step()
    assert 7.0 <= engine.stats().queue_seconds.total < 60.0


def test_a_follower_whose_page_table_is_empty_again_has_heard_it_from_the_plans(model):
    config = EngineConfig(max_seq_len=128, max_batch_size=4, page_size=8)
    comm = RecordingComm()
    leader = Engine(runner_of(model, config), comm, config)
    leader.add(Request("a", (1,) * 20, GREEDY))
    leader.add(Request("b", (2,) * 20, GREEDY))
    leader.step()
    leader.cancel("a")
    follower = runner_of(model, config)
    for message in comm.messages:
        follower.execute(decode(message))
    assert follower.page_table.num_used == 6
    drain(leader)
    leader.heartbeat()
    for message in comm.messages[1:]:
        follower.execute(decode(message))
    assert follower.page_table.num_used == leader.runner.page_table.num_used == 0


def test_a_follower_that_missed_a_plan_ends_at_the_next_comparison(model):
    config = EngineConfig(max_seq_len=128, max_batch_size=4)
    comm = RecordingComm()
    leader = Engine(runner_of(model, config), comm, config)
    leader.generate([[5, 6, 7]] * 2, GREEDY.but(max_new_tokens=100))
    messages = comm.messages
    Engine(runner_of(model, config), ReplayingComm(messages), config).follow()
    again = messages[:3] + messages[2:]  # one plan twice: the cache is the same, and still it is not the leader's
    for wrong in (again, messages[:40] + messages[41:]):
        with pytest.raises(GroupDiverged, match="before step 64 the leader's plans had the digest"):
            Engine(runner_of(model, config), ReplayingComm(wrong), config).follow()


def test_cancelling_a_waiting_request_lets_the_next_one_in(model, alone):
    engine = engine_of(model, max_batch_size=1)
    for i in range(3):
        engine.add(Request(str(i), tuple(PROMPTS[i]), GREEDY))
    engine.step()
    assert engine.cancel("1")
    tokens, _ = drain(engine)
    assert tokens["2"] == alone[2].token_ids
    assert is_clean(engine)


def test_requests_may_join_while_others_generate(model, alone):
    engine = engine_of(model, max_batched_tokens=24)
    tokens: dict[str, list[int]] = {str(i): [] for i in range(len(PROMPTS))}
    for i, prompt in enumerate(PROMPTS):
        engine.add(Request(str(i), tuple(prompt), GREEDY))
        for event in [*engine.step(), *engine.step()]:
            tokens[event.request_id].append(event.token_id)
    rest, _ = drain(engine)
    assert [tokens[str(i)] + rest.get(str(i), []) for i in range(len(PROMPTS))] == [c.token_ids for c in alone]


def test_a_step_with_nothing_to_do_does_nothing(model):
    assert engine_of(model).step() == []


def test_a_follower_that_hears_the_plans_holds_the_leader_s_cache(model):
    """Step by step, over prefill in chunks, preemption and cancels."""
    config = EngineConfig(max_seq_len=128, max_batch_size=4, max_batched_tokens=16, page_size=8, cache_pages=16)
    comm = RecordingComm()
    leader = Engine(runner_of(model, config), comm, config)
    follower = runner_of(model, config)
    for i, prompt in enumerate(PROMPTS):
        leader.add(Request(str(i), tuple(prompt), SamplingParams(seed=i, max_new_tokens=30)))
    num_steps = 0
    while leader.num_requests:
        if num_steps == 12:
            leader.cancel("1")
        leader.step()
        num_steps += 1
        follower.execute(decode(comm.messages[-1]))
        assert len(comm.messages) == num_steps
        assert torch.equal(follower.cache._data, leader.runner.cache._data), num_steps
    assert num_steps > 40
    assert leader.scheduler.num_preemptions > 0
    assert follower.cache._data.any()


def test_a_follower_follows_until_it_is_released(model):
    config = EngineConfig(max_seq_len=128, max_batch_size=4)
    comm = RecordingComm()
    leader = Engine(runner_of(model, config), comm, config)
    leader.heartbeat()
    assert len(leader.generate(PROMPTS, GREEDY)) == len(PROMPTS)
    assert [decode(message).stop for message in comm.messages] == [False] * (len(comm.messages) - 1) + [True]
    follower = Engine(runner_of(model, config), ReplayingComm(comm.messages), config)
    assert follower.generate(PROMPTS, GREEDY) == []
    assert torch.equal(follower.runner.cache._data, leader.runner.cache._data)


def test_followers_are_released_when_a_prompt_is_refused(model):
    config = EngineConfig(max_seq_len=128, max_batch_size=4)
    comm = RecordingComm()
    leader = Engine(runner_of(model, config), comm, config)
    with pytest.raises(ValueError, match=r"prompts\[1\]"):
        leader.generate([[1], []], GREEDY)
    assert [decode(message).stop for message in comm.messages] == [True]


@pytest.mark.parametrize("value", [-1, 1.5, True, "4", None])
def test_a_number_of_drafted_tokens_that_is_none_is_refused_by_name(value):
    with pytest.raises(ConfigError, match=r"^speculative_tokens=.* must be a non-negative integer; 0 turns it off$"):
        EngineConfig(speculative_tokens=value)
    with pytest.raises(ConfigError, match=r"^speculative_max_batch=.* must be a positive integer$"):
        EngineConfig(speculative_max_batch=value)


@pytest.mark.parametrize("memory", ["", "6 GiBs", "lots", 0, -1, 1.0 - 1, True, "nan", float("inf")])
def test_a_cache_of_no_size_is_refused_by_name(memory):
    with pytest.raises(ConfigError, match=r"^kv_cache_memory=.* must be bytes \(6442450944, "):
        EngineConfig(kv_cache_memory=memory)


@pytest.mark.parametrize(
    ("name", "stored", "cpu", "max_batch_size", "expected"),
    [
        ("auto", torch.bfloat16, "native", 16, torch.bfloat16),
        ("auto", torch.bfloat16, "AVX2", 16, torch.float32),
        ("auto", torch.bfloat16, "AVX2", 2, torch.bfloat16),
        ("auto", torch.bfloat16, "AVX512", 1, torch.float32),
        ("auto", torch.float16, "AVX2", 1, torch.float32),
        ("auto", torch.float32, "native", 1, torch.float32),
        ("bfloat16", torch.float32, "AVX2", 16, torch.bfloat16),
        ("float32", torch.bfloat16, "native", 1, torch.float32),
    ],
)
def test_auto_computes_in_what_is_fastest_for_the_batch(monkeypatch, name, stored, cpu, max_batch_size, expected):
    from llama_tp.checkpoint import load

    monkeypatch.setattr(load, "_computes_natively", lambda _dtype, _device: cpu == "native")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: cpu)
    assert load.resolve_dtype(name, stored, torch.device("cpu"), max_batch_size) == expected
