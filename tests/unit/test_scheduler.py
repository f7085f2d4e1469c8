"""Whatever arrives, leaves or runs short, every request computes each of its tokens in order and ends exactly once.

The tests look at the scheduler as a follower does: through its plans, which must be enough to rebuild every cache.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from llama_tp.config import EngineConfig
from llama_tp.engine import scheduler as scheduler_module
from llama_tp.engine import speculation as speculation_module
from llama_tp.engine.request import FinishReason, Logprobs, Request, TokenEvent
from llama_tp.engine.sampling_params import SamplingParams
from llama_tp.engine.scheduler import QueueFull, Scheduler

STOP_ID = 7


@pytest.fixture(autouse=True, scope="module")
def few_scored_per_step():
    """So that prompts as short as these take several steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler_module, "MAX_SCORED", 3)
        yield


class Guesser:
    """Predicts anything, as tokens' values do not matter here."""

    def __init__(self):
        self._rng = random.Random(1)

    def draft(self, tokens, most):
        return tuple(self._rng.choice([STOP_ID, *range(100, 120)]) for _ in range(self._rng.randint(0, most)))


@pytest.fixture(autouse=True, scope="module")
def guessed_drafts():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speculation_module, "PromptLookup", Guesser)
        yield


@dataclass
class Follower:
    """Knows the plans and nothing else: a page table, and what has been written to each slot of the cache."""

    page_size: int
    pages: dict[int, list[int]] = field(default_factory=dict)
    cache: dict[int, tuple[int, ...]] = field(default_factory=dict)
    """What keys and values depend on: a token and all those before it."""

    def execute(self, plan):
        """Write what the plan computes, then look that every chunk finds all before it."""
        for row in plan.freed:
            self.pages[row] = []
        for row, index, page in plan.page_updates:
            table = self.pages.setdefault(row, [])
            assert index <= len(table), "a page table with a hole"
            del table[index:]
            table.append(page)
        assert len({chunk.row for chunk in plan.chunks}) == len(plan.chunks)
        for chunk in plan.chunks:
            before = self.cache[self._slot(chunk.row, chunk.start - 1)] if chunk.start else ()
            for position, token in enumerate(chunk.tokens, chunk.start):
                before = (*before, token)
                self.cache[self._slot(chunk.row, position)] = before

    def written(self, row, length):
        return [self.cache[self._slot(row, position)] for position in range(length)]

    def _slot(self, row, position):
        return self.pages[row][position // self.page_size] * self.page_size + position % self.page_size


@dataclass
class Life:
    """What a test knows of one output of a request, in order of arrival."""

    arrival: int
    request: Request
    index: int
    tokens: list[int]
    computed: int = 0
    events: list[TokenEvent] = field(default_factory=list)
    cancelled: bool = False

    @property
    def has_ended(self):
        return self.cancelled or any(event.finish_reason is not None for event in self.events)


class Simulation:
    """A scheduler that is driven step by step, with all its promises checked at each."""

    def __init__(self, config, rng, *, stops=0.0, poison=0.0):
        self.config = config
        self.scheduler = Scheduler(config)
        self.follower = Follower(config.page_size)
        self.lives: dict[tuple[str, int], Life] = {}
        self.num_requests = 0
        self.restarts = 0
        self.hits = 0
        self.num_scored = 0
        self.num_accepted = 0
        self._rng, self._stops, self._poison = rng, stops, poison

    @property
    def active(self):
        return [life for life in self.lives.values() if not life.has_ended]

    def life(self, request_id, index=0):
        return self.lives[request_id, index]

    def add(self, num_prompt, max_new_tokens, n=1, *, scored=False):
        arrival = self.num_requests
        prompt = self._beginning(num_prompt)
        prompt += tuple(self._rng.randrange(100, 1000) for _ in range(num_prompt - len(prompt)))
        params = SamplingParams(
            max_new_tokens=max_new_tokens,
            stop_ids=frozenset({STOP_ID}),
            n=n,
            prompt_logprobs=0 if scored else None,
        )
        request = Request(f"r{arrival}", prompt, params)
        self.scheduler.add(request)
        self.num_requests += 1
        self.lives |= {(request.id, index): Life(arrival, request, index, list(prompt)) for index in range(n)}

    def _beginning(self, length):
        """Often that of an earlier request's prompt and answer."""
        if not self.config.prefix_cache or not self.lives or self._rng.random() < 0.4:
            return ()
        earlier = self._rng.choice(list(self.lives.values())).tokens
        return tuple(earlier[: self._rng.randint(0, min(length, len(earlier)))])

    def cancel(self, life, *, alone=False):
        """Its whole request, or this one output."""
        which = (life.request.id, life.index) if alone else (life.request.id,)
        assert self.scheduler.cancel(*which) is True
        assert self.scheduler.cancel(*which) is False
        for one in self.active:
            one.cancelled |= one is life or (one.request is life.request and not alone)

    def step(self, cancel_meanwhile=None):
        """Plan, execute, perhaps cancel, commit."""
        scheduler = self.scheduler
        decodes = [sequence for sequence in scheduler.running if sequence.num_uncomputed == 1]
        oldest = min(self.active, key=lambda life: life.arrival, default=None)
        preempted_before = scheduler.num_preemptions
        plan, sampled = scheduler.plan()
        names = {sequence.row: (sequence.request.id, sequence.index) for sequence in scheduler.running}
        by_row = {chunk.row: chunk for chunk in plan.chunks}
        self._check_pages()
        self.follower.execute(plan)
        self._check_chunks(plan, names)
        assert sum(len(chunk.tokens) for chunk in plan.chunks) <= self.config.max_batched_tokens
        assert sum(chunk.num_logits for chunk in plan.chunks) <= len(sampled) + scheduler_module.MAX_SCORED
        singles = [len(chunk.tokens) == 1 for chunk in plan.chunks]
        assert singles == sorted(singles, reverse=True), "decodes come first"
        assert all(sequence.row < 0 or sequence.row in by_row for sequence in decodes), "a decode waited"
        assert [(s.request.id, s.index) for s in sampled] == [
            names[chunk.row] for chunk in plan.chunks if self._is_complete(chunk, names)
        ]
        self._check_scored(plan, names)
        if oldest is not None:
            assert scheduler.running[0].row in by_row, "the first to run got nothing"
            is_plain = all(life.request.params.n == 1 for life in self.active)
            assert not is_plain or (oldest.request.id, 0) in [names[row] for row in by_row], "the oldest got nothing"
        self.restarts += scheduler.num_preemptions - preempted_before
        if cancel_meanwhile is not None and not cancel_meanwhile.has_ended:
            self.cancel(cancel_meanwhile, alone=self._rng.random() < 0.5)
        self._commit(sampled)

    def _check_pages(self):
        scheduler = self.scheduler
        owned = [page for sequence in scheduler.running for page in sequence.pages]
        may_share = self.config.prefix_cache or any(life.index for life in self.active)
        assert len(owned) == len(set(owned)) or may_share, "a page of two sequences"
        assert scheduler.blocks.num_free + len(set(owned)) == self.config.num_pages
        assert all(len(sequence.pages) == len(set(sequence.pages)) for sequence in scheduler.running)
        assert all(sequence.row < 0 and not sequence.pages for sequence in scheduler.waiting)
        rows = [sequence.row for sequence in scheduler.running]
        assert len(set(rows)) == len(rows) <= self.config.max_batch_size
        known = [*scheduler.running, *scheduler.waiting]
        arrivals = [self.life(sequence.request.id).arrival for sequence in known if sequence.index == 0]
        assert arrivals == sorted(arrivals), "first come, first served"
        assert scheduler.request_ids() == list(dict.fromkeys(life.request.id for life in self.active))
        forks = [fork for sequence in known for fork in sequence.forks]
        assert scheduler.num_waiting == len(scheduler.waiting) + len(forks)
        assert sorted((one.request.id, one.index) for one in (*known, *forks)) == sorted(
            (life.request.id, life.index) for life in self.active
        ), "an output was lost"
        for request_id in scheduler.request_ids():
            indices = [life.index for life in self.active if life.request.id == request_id]
            assert scheduler.active_outputs(request_id) == indices

    def _check_chunks(self, plan, names):
        for chunk in plan.chunks:
            life = self.lives[names[chunk.row]]
            end = chunk.start + len(chunk.tokens)
            assert chunk.tokens
            is_next = chunk.start == life.computed
            may_share = self.config.prefix_cache or life.index > 0
            is_new = chunk.start == 0 or (may_share and chunk.start % self.config.page_size == 0)
            assert is_next or is_new, "a token was left out or computed twice"
            self.hits += 0 if is_next else chunk.start
            num_drafted = max(0, end - len(life.tokens))
            self._check_drafted(life, num_drafted)
            life.computed = end - num_drafted
            if life.request.params.prompt_logprobs is None:
                assert chunk.num_logits == self._is_complete(chunk, names) + num_drafted
            assert chunk.num_logits >= self._is_complete(chunk, names)
            text = [*life.tokens, *chunk.tokens[len(chunk.tokens) - num_drafted :]]
            expected = [tuple(text[: position + 1]) for position in range(end)]
            assert self.follower.written(chunk.row, end) == expected, "this cache holds something else"

    def _check_drafted(self, life, num_drafted):
        """A step may give one token more than it was given drafted ones."""
        if num_drafted:
            assert num_drafted <= self.config.speculative_tokens
            assert len(self.scheduler.running) <= self.config.speculative_max_batch
            request = life.request
            assert len(life.tokens) + num_drafted + 1 <= len(request.prompt) + request.params.max_new_tokens

    def _is_complete(self, chunk, names):
        return chunk.start + len(chunk.tokens) >= len(self.lives[names[chunk.row]].tokens)

    def _check_scored(self, plan, names):
        """The spans must find the logits of the token before each of their targets."""
        at = []  # of each of the step's logits: the sequence and the position of the next token
        for chunk in plan.chunks:
            end = chunk.start + len(chunk.tokens)
            at += [(names[chunk.row], position) for position in range(end - chunk.num_logits + 1, end + 1)]
        spans = self.scheduler.scored
        assert sum(len(span.targets) for span in spans) <= scheduler_module.MAX_SCORED
        for span in spans:
            sequence = span.sequence
            first = len(sequence.scores)
            expected = [((sequence.request.id, sequence.index), 1 + first + i) for i in range(len(span.targets))]
            assert at[span.row : span.row + len(span.targets)] == expected
            assert span.targets == sequence.request.prompt[1 + first : 1 + first + len(span.targets)]
        sampled = [names[chunk.row] for chunk in plan.chunks if self._is_complete(chunk, names)]
        rows = range(len(at)) if self.scheduler.sampled_rows is None else self.scheduler.sampled_rows
        assert [at[row] for row in rows] == [(name, len(self.lives[name].tokens)) for name in sampled]

    def _commit(self, sampled):
        self.scheduler.commit_scores(
            [[Logprobs(-float(target), ()) for target in span.targets] for span in self.scheduler.scored]
        )
        before = self.scheduler.sampled_rows
        self._commit_round(sampled)
        while going_on := self.scheduler.sampled:
            assert before is not None
            assert {row - 1 for row in self.scheduler.sampled_rows} <= set(before)
            before = self.scheduler.sampled_rows
            for sequence in going_on:
                self.life(sequence.request.id, sequence.index).computed += 1
            self.num_accepted += len(going_on)
            self._commit_round(going_on)
        assert self.scheduler.speculation.num_accepted == self.num_accepted

    def _commit_round(self, sampled):
        ids = [self._sample(sequence.draft) for sequence in sampled]
        expected = [
            (life, token)
            for sequence, token in zip(sampled, ids, strict=True)
            if not (life := self.life(sequence.request.id, sequence.index)).cancelled
        ]
        events = self.scheduler.commit(ids)
        for happened, (life, token) in zip(events, expected, strict=True):
            request_id, index = life.request.id, life.index
            assert not life.has_ended, "an event after the end"
            life.events.append(happened)
            num_generated = len(life.tokens) - len(life.request.prompt)
            self._check_scores(life, happened)
            happened.prompt_logprobs = None
            if token is None:
                assert happened == TokenEvent(request_id, None, FinishReason.ERROR, "nan_logits", index)
            elif not life.request.params.max_new_tokens:
                assert happened == TokenEvent(request_id, None, FinishReason.LENGTH, index=index)
            elif token == STOP_ID:
                assert happened == TokenEvent(request_id, None, FinishReason.STOP, index=index, stop_id=STOP_ID)
            else:
                life.tokens.append(token)
                is_last = num_generated + 1 == life.request.params.max_new_tokens
                reason = FinishReason.LENGTH if is_last else None
                assert happened == TokenEvent(request_id, token, reason, index=index)

    def _check_scores(self, life, happened):
        """Those of the whole prompt, once per request, with the first event of the output that computed it."""
        request = life.request
        others = [one for one in self.lives.values() if one.request is request]
        is_first = request.params.prompt_logprobs is not None and not any(
            len(one.events) > (one is life) for one in others
        )
        if is_first and happened.error is None:
            assert [-one.chosen for one in happened.prompt_logprobs] == list(request.prompt[1:])
            self.num_scored += 1
        else:
            assert happened.prompt_logprobs is None

    def _sample(self, draft):
        if draft and self._rng.random() < 0.7:
            return draft[0]
        draw = self._rng.random()
        if draw < self._poison:
            return None
        return STOP_ID if draw < self._poison + self._stops else self._rng.randrange(100, 1000)

    def forget_the_ended(self):
        """Save a few that new requests may begin like: a long run would slow down."""
        ended = [key for key, life in self.lives.items() if life.has_ended]
        for key in ended[:-40]:
            del self.lives[key]

    def run(self, max_steps=2000):
        """Until all requests have ended; then nothing may be left behind."""
        steps = 0
        while self.active:
            assert steps < max_steps, "starving"
            self.step()
            steps += 1
        self.check_nothing_is_left()
        return steps

    def check_nothing_is_left(self):
        scheduler = self.scheduler
        plan, sampled = scheduler.plan()
        assert (plan.chunks, sampled, scheduler.commit([])) == ((), [], [])
        self.follower.execute(plan)
        assert not any(self.follower.pages.values()), "a follower was not told"
        assert (len(scheduler), list(scheduler.waiting), scheduler.running) == (0, [], [])
        assert scheduler.blocks.num_free == self.config.num_pages
        assert not any(scheduler.blocks._busy), "pages were reserved and never given back"
        assert sorted(scheduler._free_rows) == list(range(self.config.max_batch_size))
        assert all(life.has_ended for life in self.lives.values())
        speculation = scheduler.speculation
        assert 0 <= speculation.num_accepted <= speculation.num_drafted


@st.composite
def configs(draw):
    max_batch_size = draw(st.integers(1, 5))
    page_size = draw(st.integers(1, 4))
    max_seq_len = draw(st.integers(2, 24))
    per_sequence = -(-max_seq_len // page_size)
    return EngineConfig(
        max_seq_len=max_seq_len,
        max_batch_size=max_batch_size,
        max_batched_tokens=max_batch_size + draw(st.integers(0, 12)),
        page_size=page_size,
        prefix_cache=draw(st.booleans()),
        speculative_tokens=draw(st.sampled_from([0, 1, 4])),
        speculative_max_batch=draw(st.integers(1, 5)),
        cache_pages=draw(st.integers(per_sequence, max_batch_size * per_sequence)),
    )


@st.composite
def scenarios(draw):
    config = draw(configs())
    requests = []
    for _ in range(draw(st.integers(1, 8))):
        num_prompt = draw(st.integers(1, config.max_seq_len - 1))
        scored = draw(st.sampled_from([False, False, True]))
        num_new = draw(st.integers(0 if scored else 1, config.max_seq_len - num_prompt))
        leaves_at = draw(st.none() | st.integers(0, 25))
        n = draw(st.sampled_from([1, 1, 2, 4]))
        requests.append((draw(st.integers(0, 12)), num_prompt, num_new, n, leaves_at, draw(st.booleans()), scored))
    return config, requests


@settings(deadline=None, max_examples=250)
@given(
    scenarios(),
    st.randoms(use_true_random=False),
    st.sampled_from([0.0, 0.1]),
    st.sampled_from([0.0, 0.1]),
)
def test_every_request_runs_in_order_and_ends_once_and_leaves_nothing_behind(scenario, rng, stops, poison):
    config, requests = scenario
    simulation = Simulation(config, rng, stops=stops, poison=poison)
    leaving: dict[tuple[int, bool], list[Life]] = {}
    for step in range(40):
        for arrives_at, num_prompt, num_new, n, leaves_at, in_mid_step, scored in requests:
            if arrives_at == step:
                simulation.add(num_prompt, num_new, n, scored=scored)
                if leaves_at is not None:
                    life = list(simulation.lives.values())[-1]
                    leaving.setdefault((max(step, leaves_at), in_mid_step), []).append(life)
        for life in leaving.get((step, False), []):
            if not life.has_ended:
                simulation.cancel(life)
        simulation.step(cancel_meanwhile=next(iter(leaving.get((step, True), [])), None))
    simulation.run()
    event("with preemption" if simulation.restarts else "without preemption")
    event("with several outputs" if any(life.index for life in simulation.lives.values()) else "of one output each")
    event("with prefix hits" if simulation.hits else "without prefix hits")
    event("with scores" if simulation.num_scored else "without scores")
    event("with right drafts" if simulation.num_accepted else "without right drafts")
    for life in simulation.lives.values():
        last = life.events[-1].finish_reason if life.events else None
        if not life.cancelled and last is FinishReason.LENGTH:
            assert len(life.events) == max(1, life.request.params.max_new_tokens)


@pytest.mark.parametrize(("prefix_cache", "drafts"), [(True, 0), (False, 0), (True, 3)])
def test_thousands_of_requests_come_and_go_where_pages_are_always_short(prefix_cache, drafts):
    rng = random.Random(1)
    config = EngineConfig(
        max_seq_len=20,
        max_batch_size=6,
        max_batched_tokens=14,
        page_size=3,
        cache_pages=11,
        prefix_cache=prefix_cache,
        speculative_tokens=drafts,
        speculative_max_batch=4,
    )
    simulation = Simulation(config, rng, stops=0.05, poison=0.02)
    while simulation.num_requests < 2000 or simulation.active:
        while simulation.num_requests < 2000 and len(simulation.active) < 12:
            num_prompt = rng.randint(1, 12)
            num_new, n = rng.randint(1, 20 - num_prompt), rng.choice([1, 1, 2, 3])
            simulation.add(num_prompt, num_new, n, scored=rng.random() < 0.2)
        leaving = [life for life in simulation.active if rng.random() < 0.01]
        for life in leaving[1:]:
            if not life.has_ended:
                simulation.cancel(life, alone=rng.random() < 0.5)
        simulation.step(cancel_meanwhile=next(iter(leaving), None))
        simulation.forget_the_ended()
    simulation.check_nothing_is_left()
    assert simulation.restarts > 500, "too many pages"
    assert simulation.hits > 500, "nothing was shared"
    assert simulation.num_scored > 100
    assert (simulation.num_accepted > 500) is (drafts > 0)


@settings(deadline=None, max_examples=60)
@given(scenarios(), st.randoms(use_true_random=False))
def test_the_steps_of_a_crowd_are_at_most_those_of_one_after_the_other(scenario, rng):
    """The first to run computes a token a step at least, whatever the others do."""
    config, requests = scenario
    simulation = Simulation(config, rng)
    for _, num_prompt, num_new, n, _, _, scored in requests:
        simulation.add(num_prompt, num_new, n, scored=scored)
    assert simulation.run() <= sum(
        n * (num_prompt + max(1, num_new) - 1) for _, num_prompt, num_new, n, _, _, _ in requests
    )


def simulation_of(*, pages=None, stops=0.0, **config):
    settings = {
        "max_seq_len": 16,
        "max_batch_size": 4,
        "max_batched_tokens": 8,
        "page_size": 2,
        "prefix_cache": False,
        **config,
    }
    pages = EngineConfig(**settings).num_pages if pages is None else pages
    return Simulation(EngineConfig(**settings, cache_pages=pages), random.Random(1), stops=stops)


def chunks_of(simulation):
    """The next step's chunks as (request, start, number of tokens), committing 100 for every sampled row."""
    plan, sampled = simulation.scheduler.plan()
    names = {sequence.row: sequence.request.id for sequence in simulation.scheduler.running}
    simulation.scheduler.commit([100] * len(sampled))
    return [(names[chunk.row], chunk.start, len(chunk.tokens)) for chunk in plan.chunks]


def test_a_long_prompt_is_computed_in_chunks_beside_those_who_decode():
    simulation = simulation_of(max_batched_tokens=4)
    simulation.add(2, 6)
    assert chunks_of(simulation) == [("r0", 0, 2)]
    simulation.add(7, 2)
    assert chunks_of(simulation) == [("r0", 2, 1), ("r1", 0, 3)]
    assert chunks_of(simulation) == [("r0", 3, 1), ("r1", 3, 3)]
    assert chunks_of(simulation) == [("r0", 4, 1), ("r1", 6, 1)]


def test_a_plan_tells_only_of_the_pages_that_are_new_and_one_step_before_they_are_needed():
    """So that every rank can lay out the next step while it computes this one."""
    simulation = simulation_of(page_size=4)
    simulation.add(7, 4)
    told = []
    for _ in range(4):
        plan, sampled = simulation.scheduler.plan()
        told.append(plan.page_updates)
        simulation.scheduler.commit([100] * len(sampled))
    assert told == [((0, 0, 0), (0, 1, 1)), ((0, 2, 2),), (), ()]


def test_a_fresh_prompt_takes_what_is_left_of_the_budget():
    simulation = simulation_of(max_batched_tokens=8)
    simulation.add(5, 2)
    simulation.add(5, 2)
    simulation.add(5, 2)
    assert chunks_of(simulation) == [("r0", 0, 5), ("r1", 0, 3)]
    assert chunks_of(simulation) == [("r0", 5, 1), ("r1", 3, 2), ("r2", 0, 5)]


def test_no_more_requests_run_than_max_batch_size():
    simulation = simulation_of(max_batch_size=2)
    for _ in range(3):
        simulation.add(1, 2)
    assert [name for name, _, _ in chunks_of(simulation)] == ["r0", "r1"]
    assert [name for name, _, _ in chunks_of(simulation)] == ["r0", "r1"]
    assert [name for name, _, _ in chunks_of(simulation)] == ["r2"]


def test_a_small_request_does_not_overtake_a_large_one_that_waits_for_pages():
    simulation = simulation_of(pages=8)
    simulation.add(8, 8)
    simulation.add(10, 2)
    simulation.add(1, 1)
    assert chunks_of(simulation) == [("r0", 0, 8)]
    assert chunks_of(simulation) == [("r0", 8, 1)]


def test_the_youngest_is_preempted_and_recomputed_with_what_it_had_generated():
    simulation = simulation_of(pages=8, max_batched_tokens=16)  # two sequences of 8 tokens fill the cache
    simulation.add(6, 8)
    simulation.add(6, 8)
    assert chunks_of(simulation) == [("r0", 0, 6), ("r1", 0, 6)]
    assert chunks_of(simulation) == [("r0", 6, 1), ("r1", 6, 1)]
    assert chunks_of(simulation) == [("r0", 7, 1), ("r1", 7, 1)]
    assert simulation.scheduler.num_preemptions == 0
    assert chunks_of(simulation) == [("r0", 8, 1)]
    assert simulation.scheduler.num_preemptions == 1
    for position in range(9, 13):  # r1 needs 5 pages, and r0 has 5 and then 6 of 8
        assert chunks_of(simulation) == [("r0", position, 1)]
    assert chunks_of(simulation) == [("r1", 0, 9)]
    assert chunks_of(simulation) == [("r1", 9, 1)]


def test_one_that_was_preempted_runs_again_before_those_that_came_later():
    simulation = simulation_of(pages=8, max_batched_tokens=16)
    simulation.add(6, 8)
    simulation.add(6, 8)
    while not simulation.restarts:
        simulation.step()
    simulation.add(1, 1)
    while not simulation.life("r0").has_ended:  # r1 waits for its pages; r2 would fit
        assert not simulation.life("r2").events
        simulation.step()
    simulation.run()


def test_nobody_is_admitted_in_a_step_that_preempted():
    """It would take the pages that the preempted one is waiting for."""
    simulation = simulation_of(pages=8, max_batched_tokens=16)
    simulation.add(6, 8)
    simulation.add(6, 8)
    for _ in range(3):
        chunks_of(simulation)
    simulation.add(1, 1)
    assert chunks_of(simulation) == [("r0", 8, 1)]


def test_cancelling_frees_rows_and_pages_at_once():
    simulation = simulation_of(max_batch_size=1)
    simulation.add(7, 4)
    simulation.add(7, 4)
    running, waiting = simulation.lives.values()
    simulation.step()
    assert simulation.scheduler.blocks.num_free == simulation.config.num_pages - 4
    simulation.cancel(running)
    assert simulation.scheduler.blocks.num_free == simulation.config.num_pages
    simulation.cancel(waiting)
    simulation.check_nothing_is_left()
    assert simulation.scheduler.cancel("never seen") is False


def test_the_next_turn_of_a_conversation_computes_only_what_is_new():
    simulation = simulation_of(prefix_cache=True, max_seq_len=32, max_batched_tokens=32)
    scheduler = simulation.scheduler
    scheduler.add(Request("first turn", tuple(range(9)), SamplingParams(max_new_tokens=4)))
    for token in (20, 21, 22, 23):
        scheduler.plan()
        scheduler.commit([token])
    scheduler.add(Request("second turn", (*range(9), 20, 21, 22, 23, 50, 51), SamplingParams(max_new_tokens=4)))
    plan, _ = scheduler.plan()
    (chunk,) = plan.chunks
    assert chunk.start == 12, "six pages of two tokens; the last token of the answer was never computed"
    assert chunk.tokens == (23, 50, 51)
    assert (scheduler.num_prefix_hits, scheduler.num_prompt_tokens) == (12, 9 + 15)
    (sequence,) = scheduler.running
    assert sequence.pages == list(range(8)), "the pages are still neighbours"


def test_a_page_is_shared_once_a_sampled_token_has_proved_it_finite():
    simulation = simulation_of(prefix_cache=True, max_batched_tokens=16)
    for index in range(2):
        simulation.scheduler.add(Request(str(index), (1, 2, 3, 4, 5 + index), SamplingParams(max_new_tokens=2)))
    assert [start for _, start, _ in chunks_of(simulation)] == [0, 0]
    simulation.scheduler.add(Request("later", (1, 2, 3, 4, 9), SamplingParams(max_new_tokens=2)))
    plan, _ = simulation.scheduler.plan()
    assert (4, (9,)) in [(chunk.start, chunk.tokens) for chunk in plan.chunks]


@pytest.mark.parametrize("end", ["nonfinite", "cancelled"])
def test_what_was_never_proved_finite_serves_nobody(end):
    """Keys and values of a nonfinite token are zeros in the cache: whoever shared them would read garbage."""
    simulation = simulation_of(prefix_cache=True, max_batched_tokens=4)
    for request_id in ("first", "second"):
        simulation.scheduler.add(Request(request_id, (1, 2, 3, 4, 5, 6), SamplingParams(max_new_tokens=1)))
        plan, sampled = simulation.scheduler.plan()
        assert [chunk.start for chunk in plan.chunks] == [0]
        simulation.scheduler.commit([None] * len(sampled))
        if end == "cancelled":
            simulation.scheduler.cancel(request_id)
        else:
            simulation.scheduler.plan()
            simulation.scheduler.commit([None])


def test_what_was_released_first_is_overwritten_first():
    simulation = simulation_of(prefix_cache=True, pages=8, max_batched_tokens=16)
    scheduler = simulation.scheduler
    for start in (0, 100, 200):  # three pages of content each, in a cache of eight
        scheduler.add(Request(str(start), tuple(range(start, start + 6)), SamplingParams(max_new_tokens=1)))
        scheduler.plan()
        scheduler.commit([1])
    assert [len(scheduler.blocks.match([*range(start, start + 6), 1])) for start in (0, 100, 200)] == [0, 3, 3]


def test_cancelling_an_output_that_waits_for_the_prompt_leaves_its_siblings_to_share_it():
    simulation = simulation_of(max_batched_tokens=4)  # without a prefix cache for others
    scheduler = simulation.scheduler
    simulation.add(8, 3, n=3)
    simulation.step()
    simulation.cancel(simulation.life("r0", 1), alone=True)
    assert (len(scheduler.waiting), scheduler.active_outputs("r0")) == (0, [0, 2])
    simulation.run()
    assert simulation.hits == 6, "three pages of two; the last token must be computed"


@pytest.mark.parametrize("steps", [0, 1])
def test_when_the_output_that_computes_the_prompt_is_cancelled_the_next_one_computes_it_for_all(steps):
    simulation = simulation_of(max_batched_tokens=4)
    scheduler = simulation.scheduler
    simulation.add(8, 3, n=4)
    simulation.add(2, 3)
    for _ in range(steps):
        simulation.step()
    simulation.cancel(simulation.life("r0", 0), alone=True)
    successor = scheduler.waiting[0]
    assert (successor.request.id, successor.index, len(successor.forks)) == ("r0", 1, 2)
    simulation.run()
    assert simulation.hits == 2 * 6, "of three outputs, two found three pages of two tokens"


def test_no_more_outputs_wait_than_may_wait_and_those_of_one_request_count():
    simulation = simulation_of(max_waiting=5, max_batch_size=2, max_batched_tokens=64)
    simulation.add(3, 2, n=3)
    simulation.add(3, 2, n=2)
    with pytest.raises(QueueFull, match="5 outputs are already waiting, and n=1 more would exceed max_waiting=5"):
        simulation.add(3, 2)
    simulation.step()
    assert simulation.scheduler.num_waiting == 3
    with pytest.raises(QueueFull):
        simulation.add(3, 2, n=3)
    with pytest.raises(ValueError, match="n=6 exceeds max_waiting=5"):
        simulation.add(3, 2, n=6)
    simulation.add(3, 2, n=2)
    simulation.run()


def test_an_id_that_was_cancelled_and_came_back_in_mid_step_does_not_get_the_old_one_s_token():
    simulation = simulation_of()
    request = Request("same", (1, 2), SamplingParams(max_new_tokens=1))
    simulation.scheduler.add(request)
    _, sampled = simulation.scheduler.plan()
    simulation.scheduler.cancel("same")
    simulation.scheduler.add(request)
    assert simulation.scheduler.commit([5] * len(sampled)) == []
    _, sampled = simulation.scheduler.plan()
    assert simulation.scheduler.commit([6]) == [TokenEvent("same", 6, FinishReason.LENGTH)]


def test_a_row_s_pages_are_neighbours_where_the_cache_is_free():
    """The model reads such a row as one slice of the cache."""
    simulation = simulation_of()
    for _ in range(3):
        simulation.add(8, 8)
    for _ in range(6):
        simulation.step()
    assert [len(sequence.pages) for sequence in simulation.scheduler.running] == [7, 6, 6]
    for sequence in simulation.scheduler.running:
        assert sequence.pages == list(range(sequence.pages[0], sequence.pages[0] + len(sequence.pages)))


@pytest.mark.parametrize(
    ("prompt", "max_new_tokens", "words"),
    [
        ((), 1, "prompt is empty"),
        ((1,) * 16, 1, "prompt of 16 tokens + max_new_tokens=1 exceeds max_seq_len=16"),
        ((1,) * 10, 7, "max_seq_len=16"),
        ((1,) * 8, 7, "whole KV cache of 14 tokens"),
    ],
)
def test_a_request_that_can_never_run_is_refused_and_changes_nothing(prompt, max_new_tokens, words):
    simulation = simulation_of(pages=7)
    simulation.add(3, 2)
    with pytest.raises(ValueError, match=words.replace("+", r"\+")):
        simulation.scheduler.add(Request("bad", prompt, SamplingParams(max_new_tokens=max_new_tokens)))
    assert simulation.scheduler.request_ids() == ["r0"]
    simulation.run()


def test_an_id_in_use_is_refused():
    simulation = simulation_of()
    simulation.add(3, 2)
    with pytest.raises(ValueError, match="'r0' is already in use"):
        simulation.scheduler.add(Request("r0", (1,), SamplingParams()))
    simulation.run()


def test_a_request_that_fills_the_context_exactly_runs():
    simulation = simulation_of(pages=8)
    simulation.add(15, 1)
    simulation.add(1, 15)
    simulation.run()
    assert [len(life.tokens) for life in simulation.lives.values()] == [16, 16]


def drafting(**config):
    """One that drafts four tokens, which count up from 1, whenever it may."""
    return simulation_of(speculative_tokens=4, speculative_max_batch=2, **{"max_seq_len": 32, **config})


@pytest.fixture
def counted_drafts(monkeypatch):
    monkeypatch.setattr(scheduler_module, "MAX_SCORED", 128)
    monkeypatch.setattr(Guesser, "draft", lambda self, tokens, most: tuple(range(1, 1 + most)))


def step(scheduler, *rounds):
    """Plan a step and commit what is sampled, round by round. Returns its chunks' tokens and the events' tokens."""
    plan, _ = scheduler.plan()
    events = [event for ids in rounds for event in scheduler.commit(ids)]
    assert not scheduler.sampled, "more is expected"
    return [chunk.tokens for chunk in plan.chunks], [event.token_id for event in events]


@pytest.mark.usefixtures("counted_drafts")
def test_sampling_goes_on_until_a_token_differs_from_the_draft():
    scheduler = drafting().scheduler
    scheduler.add(Request("r", (50, 51), SamplingParams(max_new_tokens=30)))
    assert step(scheduler, [1], [2], [9]) == ([(50, 51, 1, 2, 3, 4)], [1, 2, 9])
    (sequence,) = scheduler.running
    assert (sequence.tokens, sequence.num_computed) == ([50, 51, 1, 2, 9], 4)
    assert step(scheduler, [8]) == ([(9, 1, 2, 3, 4)], [8]), "what was computed in vain is computed anew"
    assert step(scheduler, [1], [2], [3], [4], [7]) == ([(8, 1, 2, 3, 4)], [1, 2, 3, 4, 7])
    assert (scheduler.speculation.num_drafted, scheduler.speculation.num_accepted) == (12, 6)


@pytest.mark.usefixtures("counted_drafts")
def test_sequences_whose_drafts_are_right_go_on_without_the_others(monkeypatch):
    monkeypatch.setattr(scheduler_module, "MAX_SCORED", 6)
    scheduler = drafting(max_batched_tokens=20).scheduler
    for name in "ab":
        scheduler.add(Request(name, (50,), SamplingParams(max_new_tokens=30)))
    plan, _ = scheduler.plan()
    assert [chunk.num_logits for chunk in plan.chunks] == [5, 3], "six more than one each"
    assert scheduler.sampled_rows == [0, 5]
    assert [event.request_id for event in scheduler.commit([5, 1])] == ["a", "b"]
    assert ([one.request.id for one in scheduler.sampled], scheduler.sampled_rows) == (["b"], [6])
    assert [event.request_id for event in scheduler.commit([5])] == ["b"]
    assert scheduler.sampled == []


@pytest.mark.usefixtures("counted_drafts")
@pytest.mark.parametrize(("remaining", "num_drafted"), [(1, 0), (2, 1), (4, 3), (6, 4)])
def test_a_draft_ends_before_max_new_tokens(remaining, num_drafted):
    scheduler = drafting().scheduler
    scheduler.add(Request("r", (50,), SamplingParams(max_new_tokens=remaining)))
    plan, _ = scheduler.plan()
    assert len(plan.chunks[0].tokens) == 1 + num_drafted


@pytest.mark.usefixtures("counted_drafts")
def test_a_stop_id_in_the_draft_ends_the_sequence_there():
    scheduler = drafting().scheduler
    scheduler.add(Request("r", (50,), SamplingParams(max_new_tokens=30, stop_ids=frozenset({2}))))
    scheduler.plan()
    (first,) = scheduler.commit([1])
    (last,) = scheduler.commit([2])
    assert (first.token_id, last.token_id, last.finish_reason, last.stop_id) == (1, None, FinishReason.STOP, 2)
    assert (scheduler.sampled, len(scheduler), scheduler.blocks.num_free) == ([], 0, scheduler.config.num_pages)


@pytest.mark.usefixtures("counted_drafts")
@pytest.mark.parametrize("last", [7, None])
def test_one_that_ends_after_the_token_that_its_draft_predicts_again_has_ended(last, monkeypatch):
    monkeypatch.setattr(Guesser, "draft", lambda self, tokens, most: (50,) * most)
    scheduler = drafting().scheduler
    scheduler.add(Request("r", (50,), SamplingParams(max_new_tokens=30, stop_ids=frozenset({7}))))
    assert step(scheduler, [50], [last]) == ([(50,) * 5], [50, None])
    assert len(scheduler) == 0


@pytest.mark.usefixtures("counted_drafts")
def test_with_more_running_than_speculative_max_batch_nobody_gets_a_draft():
    scheduler = drafting(max_batched_tokens=32).scheduler
    for name in "abc":
        scheduler.add(Request(name, (50,), SamplingParams(max_new_tokens=30)))
    assert step(scheduler, [1, 1, 1])[0] == [(50,)] * 3
    scheduler.cancel("b")
    assert step(scheduler, [9, 9])[0] == [(1, 1, 2, 3, 4), (1, 1, 2, 3, 4)]


@pytest.mark.usefixtures("counted_drafts")
def test_drafts_get_what_others_leave_of_the_budget():
    scheduler = drafting(max_batched_tokens=6).scheduler
    scheduler.add(Request("decodes", (50,), SamplingParams(max_new_tokens=30)))
    assert step(scheduler, [9])[0] == [(50, 1, 2, 3, 4)]
    scheduler.add(Request("prompt", tuple(range(60, 69)), SamplingParams(max_new_tokens=20)))
    assert step(scheduler, [9])[0] == [(9,), (60, 61, 62, 63, 64)]
    assert step(scheduler, [9, 9])[0] == [(9, 1), (65, 66, 67, 68)]


@pytest.mark.usefixtures("counted_drafts")
def test_drafts_preempt_nobody_and_shrink_to_the_pages_that_are_free():
    scheduler = drafting(pages=5, max_batched_tokens=32).scheduler  # of two tokens
    scheduler.add(Request("a", (50, 51, 52), SamplingParams(max_new_tokens=7)))
    scheduler.add(Request("b", (50, 51, 52), SamplingParams(max_new_tokens=7)))
    chunks, _ = step(scheduler, [9, 9])
    assert chunks == [(50, 51, 52, 1, 2, 3), (50, 51, 52, 1)]
    assert (scheduler.num_preemptions, scheduler.blocks.num_free) == (0, 0)
    assert step(scheduler, [9, 9])[0] == [(9,), (9, 1, 2)]
    assert scheduler.num_preemptions == 0


@pytest.mark.usefixtures("counted_drafts")
def test_of_a_draft_only_what_was_sampled_reaches_the_prefix_cache():
    scheduler = drafting(prefix_cache=True).scheduler
    scheduler.add(Request("r", (50, 51, 52), SamplingParams(max_new_tokens=8)))
    step(scheduler, [1], [9])
    step(scheduler, [9])
    assert len(scheduler.blocks.match([50, 51, 52, 1, 9, 9])) == 2
    assert len(scheduler.blocks.match([50, 51, 52, 1, 2, 3, 4])) == 2
    step(scheduler, [9])
    assert len(scheduler.blocks.match([50, 51, 52, 1, 9, 9, 9])) == 3
    assert len(scheduler.blocks.match([50, 51, 52, 1, 2, 3, 4])) == 2


@pytest.mark.usefixtures("counted_drafts")
def test_a_prompt_that_is_scored_gets_no_draft():
    scheduler = drafting().scheduler
    scheduler.add(Request("r", (50, 51), SamplingParams(max_new_tokens=8, prompt_logprobs=0)))
    plan, _ = scheduler.plan()
    assert plan.chunks[0].tokens == (50, 51)
