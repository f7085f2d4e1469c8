"""The mailbox: notes from any thread, events back, and a process that ends when its engine cannot go on."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time

import pytest

from llama_tp.config import EngineConfig
from llama_tp.engine.codec import decode
from llama_tp.engine.engine import Engine
from llama_tp.engine.loop import EXIT_STEP_FAILED, EngineLoop, EngineThread
from llama_tp.engine.request import FinishReason, Request, TokenEvent
from llama_tp.engine.sampling_params import SamplingParams
from llama_tp.engine.step import StepPlan
from llama_tp.parallel.comm import PeerLost
from tests.tiny_model import MODELS, engine_of, random_model, runner_of
from tests.unit.comm_doubles import RecordingComm
from tests.waiting import PATIENCE_S, wait_until

GREEDY = SamplingParams(temperature=0, max_new_tokens=6)
LONG = SamplingParams(temperature=0, max_new_tokens=30_000)


@pytest.fixture(scope="module")
def model():
    return random_model(MODELS["multiplier"])


@pytest.fixture
def start(model, one_thread):
    """Starts loops, and stops them after the test."""
    loops = []

    def start_one(engine=None, *, abandon_after_s=3600, **config):
        engine = engine or engine_of(model, **config)
        loops.append(EngineLoop(engine, abandon_after_s=abandon_after_s))
        loops[-1].start()
        return loops[-1]

    yield start_one
    for loop in loops:
        loop.stop()


def request_of(request_id, prompt=(1, 2, 3), params=GREEDY):
    return Request(request_id, tuple(prompt), params)


def collect(loop, *request_ids):
    """Events of each request, up to the end of all of them."""
    events: dict[str, list[TokenEvent]] = {request_id: [] for request_id in request_ids}
    deadline = time.monotonic() + PATIENCE_S
    while not all(one and one[-1].finish_reason for one in events.values()):
        assert time.monotonic() < deadline, f"no end: {events}"
        for event in loop.poll(0.5):
            events[event.request_id].append(event)
    return events


def test_what_is_submitted_comes_back_token_by_token(start, model):
    (expected,) = engine_of(model).generate([(1, 2, 3)], GREEDY)
    loop = start()
    loop.submit(request_of("a"))
    events = collect(loop, "a")["a"]
    assert [event.token_id for event in events] == expected.token_ids
    assert [event.finish_reason for event in events] == [None] * 5 + [FinishReason.LENGTH]
    assert loop.poll(0) == []


def test_many_threads_may_submit_at_once(start, model):
    prompts = {f"{thread}.{i}": (thread + 1, i + 1) for thread in range(6) for i in range(5)}
    expected = engine_of(model).generate(list(prompts.values()), GREEDY)
    loop = start()

    def submit_some(thread):
        for i in range(5):
            loop.submit(request_of(f"{thread}.{i}", prompts[f"{thread}.{i}"]))

    threads = [threading.Thread(target=submit_some, args=(thread,)) for thread in range(6)]
    for thread in threads:
        thread.start()
    events = collect(loop, *prompts)
    for thread in threads:
        thread.join()
    for (request_id, _), completion in zip(prompts.items(), expected, strict=True):
        assert [event.token_id for event in events[request_id]] == completion.token_ids


def test_cancel_from_another_thread_ends_a_request_without_a_word_to_its_neighbour(start, model):
    loop = start(max_seq_len=32_768, max_batch_size=2)
    loop.submit(request_of("leaves", params=LONG))
    assert loop.poll(PATIENCE_S)
    canceller = threading.Thread(target=loop.cancel, args=("leaves",))
    canceller.start()
    canceller.join()
    assert wait_until(lambda: loop.engine.num_requests == 0)
    assert wait_until(lambda: loop.engine.scheduler.blocks.num_free == loop.engine.config.num_pages)
    loop.poll(0)
    loop.submit(request_of("stays"))
    assert collect(loop, "stays")["stays"][-1].finish_reason is FinishReason.LENGTH


def test_a_request_that_is_cancelled_before_it_began_never_speaks(start):
    loop = start(max_seq_len=32_768, max_batch_size=1)
    loop.submit(request_of("first", params=LONG))
    loop.submit(request_of("second"))
    loop.cancel("second")
    loop.cancel("never seen")
    assert wait_until(lambda: loop.engine.scheduler.request_ids() == ["first"])
    assert {event.request_id for event in loop.poll(PATIENCE_S)} == {"first"}


@pytest.mark.parametrize(
    ("prompt", "params"),
    [((), GREEDY), ((64,), GREEDY), ((1,) * 100, SamplingParams(max_new_tokens=100))],
    ids=["empty", "outside the vocabulary", "too long"],
)
def test_a_request_that_cannot_run_is_told_so_and_harms_nobody(start, prompt, params):
    loop = start()
    loop.submit(request_of("good"))
    loop.submit(request_of("bad", prompt, params))
    events = collect(loop, "good", "bad")
    assert events["bad"] == [TokenEvent("bad", None, FinishReason.ERROR, "cannot_run")]
    assert events["good"][-1].finish_reason is FinishReason.LENGTH


def test_polling_waits_for_the_first_event_and_no_longer(start):
    loop = start()
    begin = time.monotonic()
    assert loop.poll(0.05) == []
    assert 0.04 < time.monotonic() - begin < PATIENCE_S / 2
    threading.Timer(0.05, loop.submit, (request_of("a"),)).start()
    assert loop.poll(PATIENCE_S)[0].request_id == "a"
    assert time.monotonic() - begin < PATIENCE_S / 2


def test_when_nobody_polls_any_more_all_requests_are_cancelled(clock, start, caplog):
    caplog.set_level(logging.INFO)
    loop = start(abandon_after_s=60, max_seq_len=32_768, max_batch_size=1)
    loop.submit(request_of("running", params=LONG))
    loop.submit(request_of("waiting", params=LONG))
    assert wait_until(lambda: loop.engine.num_requests == 2)
    clock.now += 61
    assert wait_until(lambda: "nobody has polled" in caplog.text)
    assert wait_until(lambda: sum(event.finish_reason is not None for event in list(loop._events)) == 2)
    assert loop.engine.num_requests == 0
    events = loop.poll(0)
    assert events[-2:] == [
        TokenEvent("running", None, FinishReason.CANCELLED),
        TokenEvent("waiting", None, FinishReason.CANCELLED),
    ]
    loop.submit(request_of("later"))
    assert collect(loop, "later")["later"][-1].finish_reason is FinishReason.LENGTH


def test_who_keeps_polling_is_not_abandoned(clock, start):
    loop = start(abandon_after_s=60, max_seq_len=32_768)
    loop.submit(request_of("a", params=LONG))
    for _ in range(3):
        clock.now += 40
        assert_that_it_goes_on(loop)


def test_who_waits_for_a_slow_step_is_not_abandoned(clock, start, model):
    engine = engine_of(model)
    execute = engine.runner.execute

    def slow(plan):
        assert wait_until(lambda: loop._num_polling)
        clock.now += 61
        return execute(plan)

    engine.runner.execute = slow
    loop = start(engine, abandon_after_s=60)
    loop.submit(request_of("a", params=GREEDY.but(max_new_tokens=3)))
    events = []
    while not any(event.finish_reason for event in events):
        events += loop.poll(PATIENCE_S)
    assert events[-1].finish_reason is FinishReason.LENGTH


def assert_that_it_goes_on(loop):
    """Nobody polls meanwhile; the last of the steps begins after the call."""
    num_seen = len(loop._events)
    assert wait_until(lambda: len(loop._events) > num_seen + 2 or any(event.finish_reason for event in loop._events))
    assert not any(event.finish_reason for event in loop.poll(0))


def test_the_thread_that_loaded_the_engine_runs_every_step(model):
    thread = EngineThread()
    engine = thread.call(lambda: engine_of(model))
    execute, seen = engine.runner.execute, []

    def execute_and_tell(plan):
        seen.append(threading.get_ident())
        return execute(plan)

    engine.runner.execute = execute_and_tell
    loop = EngineLoop(engine, abandon_after_s=3600, thread=thread)
    loop.start()
    loop.submit(request_of("a"))
    collect(loop, "a")
    loop.stop()
    assert set(seen) == {thread.call(threading.get_ident)}
    assert seen[0] != threading.get_ident()


def test_an_error_in_a_call_is_the_caller_s_and_the_thread_goes_on():
    thread = EngineThread()
    with pytest.raises(ZeroDivisionError):
        thread.call(lambda: 1 / 0)
    assert thread.call(lambda: 1 + 1) == 2


def test_a_loop_that_stops_lets_its_followers_go(start, model):
    config = EngineConfig(max_seq_len=64, max_batch_size=2)
    comm = RecordingComm()
    loop = EngineLoop(Engine(runner_of(model, config), comm, config), abandon_after_s=3600)
    loop.start()
    loop.submit(request_of("a"))
    collect(loop, "a")
    loop.stop()
    plans = [decode(message) for message in comm.messages]
    assert [plan.step for plan in plans[:6]] == [1, 2, 3, 4, 5, 6]
    assert plans[-1] == StepPlan(0, stop=True)
    assert not any(plan.stop for plan in plans[:-1])


@pytest.mark.parametrize("n", [1, 3])
def test_a_request_whose_time_is_up_ends_with_what_it_has(clock, start, n):
    loop = start(max_seq_len=32_000, max_batch_size=4)
    loop.submit(Request("late", (1, 2, 3), LONG.but(n=n), timeout_s=60))
    loop.submit(request_of("patient", params=LONG))
    assert wait_until(lambda: loop.stats().running == n + 1)
    assert wait_until(lambda: sum(event.request_id == "late" for event in list(loop._events)) > n)
    clock.now += 60
    events = collect_only(loop, "late", ends=n)
    assert {event.index for event in events if event.finish_reason is FinishReason.TIMEOUT} == set(range(n))
    assert sum(event.token_id is not None for event in events) > n
    assert loop.stats().running == 1
    loop.cancel("patient")


def test_waiting_counts_against_the_timeout(start):
    loop = start(max_seq_len=32_000, max_batch_size=1)
    loop.submit(request_of("first", params=LONG))
    loop.submit(Request("waits", (1, 2, 3), GREEDY, timeout_s=0.05))
    events = collect_only(loop, "waits")
    assert events == [TokenEvent("waits", None, FinishReason.TIMEOUT)]
    loop.cancel("first")


def test_an_id_that_is_used_again_does_not_inherit_a_deadline(clock, start):
    loop = start(max_seq_len=32_000)
    with loop._changed:  # the loop finds all three notes at once
        loop.submit(Request("a", (1, 2, 3), LONG, timeout_s=60))
        loop.cancel("a")
        loop.submit(request_of("a", params=LONG))
    assert_that_it_goes_on(loop)
    clock.now += 61
    assert_that_it_goes_on(loop)
    loop.cancel("a")


def test_a_request_that_finds_the_queue_full_is_told_so_and_the_others_go_on(start):
    loop = start(max_seq_len=32_000, max_batch_size=1, max_waiting=2)
    loop.submit(request_of("first", params=LONG))
    assert wait_until(lambda: loop.stats().running == 1)
    loop.submit(request_of("second"))
    loop.submit(request_of("third", params=GREEDY.but(n=2)))
    events = collect_only(loop, "third", ends=2)
    assert events == [TokenEvent("third", None, FinishReason.ERROR, "queue_full", index) for index in range(2)]
    loop.cancel("first")
    assert len(collect_only(loop, "second")) == 6


def test_requests_that_were_submitted_together_wait_together_or_not_at_all(start):
    loop = start(max_seq_len=32_000, max_batch_size=1, max_waiting=3)
    loop.submit(request_of("first", params=LONG))
    assert wait_until(lambda: loop.stats().running == 1)
    loop.submit(request_of("waits"))
    loop.submit(*(request_of(name, params=GREEDY.but(n=1)) for name in ("a", "b", "c")))
    events = [collect_only(loop, name)[-1] for name in ("a",)]
    assert [event.error for event in events] == ["queue_full"]
    assert loop.engine.scheduler.request_ids() == ["first", "waits"]
    loop.submit(request_of("d"), request_of("cannot", (10**6,)))
    assert collect_only(loop, "d")[-1].error == "cannot_run"
    loop.submit(request_of("e"), request_of("f"))
    loop.cancel("first")
    for name in ("e",):
        assert len(collect_only(loop, name)) == 6
    assert wait_until(lambda: loop.engine.num_requests == 0)


def collect_only(loop, request_id, ends=1):
    """Events of one request up to its end, whatever else comes."""
    events: list[TokenEvent] = []
    deadline = time.monotonic() + PATIENCE_S
    while sum(event.finish_reason is not None for event in events) < ends:
        assert time.monotonic() < deadline, f"no end: {events}"
        events += [event for event in loop.poll(0.1) if event.request_id == request_id]
    return events


def heartbeats(comm):
    plans = [decode(message) for message in comm.messages]
    return sum(not plan.chunks and not plan.stop for plan in plans)


def test_an_idle_leader_lets_its_followers_know_that_it_lives(start, model):
    config = EngineConfig(max_seq_len=64, max_batch_size=2, heartbeat_s=0.02)
    comm = RecordingComm()
    start(Engine(runner_of(model, config), comm, config))
    assert wait_until(lambda: heartbeats(comm) >= 5)


def test_commands_that_cause_no_step_do_not_keep_the_heartbeat_away(start, model):
    """Each of them woke the idle leader before its heartbeat was due, and followers would have given it up for lost."""
    config = EngineConfig(max_seq_len=64, max_batch_size=2, heartbeat_s=0.2)
    comm = RecordingComm()
    loop = start(Engine(runner_of(model, config), comm, config))

    def note_and_look():
        loop.cancel("never seen")
        return heartbeats(comm) >= 1

    assert wait_until(note_and_look)


def test_a_follower_whose_leader_is_lost_ends_its_process(start, model, monkeypatch, caplog):
    class Deserted(RecordingComm):
        is_leader = False

        def publish(self, message):
            raise PeerLost("publishing a plan failed: timed out")

    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr(logging, "shutdown", lambda: None)
    config = EngineConfig(max_seq_len=64, max_batch_size=2)
    follower = Engine(runner_of(model, config), Deserted(), config)
    assert EngineThread().run(follower.follow).wait(PATIENCE_S)
    assert ended == [EXIT_STEP_FAILED]
    (record,) = [record for record in caplog.records if record.levelno == logging.CRITICAL]
    assert record.exc_info is None
    assert record.getMessage() == (
        "publishing a plan failed: timed out; this rank exits so that the group is restarted"
    )


FAILING = """
import logging, sys, time
from types import SimpleNamespace
from llama_tp.engine.loop import EngineLoop
from llama_tp.engine.request import Request
from llama_tp.engine.sampling_params import SamplingParams

class Broken:
    config = SimpleNamespace(heartbeat_s=1.0)
    num_requests = 0
    def add_all(self, requests, arrival): self.num_requests = 1
    def step(self): raise RuntimeError("an all-reduce failed")

logging.basicConfig(stream=sys.stderr)
loop = EngineLoop(Broken(), abandon_after_s=60)
loop.start()
loop.submit(Request("a", (1,), SamplingParams()))
loop.poll(60)
print("still here")
"""


def test_a_step_that_fails_ends_the_process_with_exit_code_70_and_one_log_line():
    assert EXIT_STEP_FAILED == 70
    done = subprocess.run([sys.executable, "-c", FAILING], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 70
    assert done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if line.startswith(("CRITICAL", "ERROR", "WARNING", "INFO"))]
    assert len(lines) == 1
    assert lines[0].startswith("CRITICAL:llama_tp.engine.loop:the engine failed")
    assert "RuntimeError: an all-reduce failed" in done.stderr
