"""Runs the engine in its own thread, behind a mailbox: the interface for servers.

A step never waits for the server and the server never waits for a step: `submit` and `cancel` leave a command, `poll`
takes the events since the last poll. A failure of the group ends the process, so that its supervisor restarts the
whole group.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from collections.abc import Sequence as Items
from concurrent.futures import Future
from typing import TypeVar

from llama_tp.engine.engine import Engine
from llama_tp.engine.request import FinishReason, Request, TokenEvent
from llama_tp.engine.scheduler import QueueFull
from llama_tp.engine.stats import EngineStats
from llama_tp.parallel.comm import PeerLost
from llama_tp.parallel.launch import exit_rank

log = logging.getLogger(__name__)

T = TypeVar("T")

EXIT_STEP_FAILED = 70
"""Exit code of a rank whose step raised, or whose peers fell silent."""


class EngineThread:
    """The one thread of a process that computes: it loads and packs weights, and executes every step.

    OpenMP keeps a thread pool per computing thread. Two pools on the same cores make a decode step take
    1.6 times as long (measured), so no other thread may touch a large tensor.
    """

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name="engine", daemon=True)
        self._thread.start()

    def call(self, function: Callable[[], T]) -> T:
        """Run a function in the thread, and return or raise its result."""
        future: Future[T] = Future()

        def work() -> None:
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        self._work.put(work)
        return future.result()

    def run(self, function: Callable[[], None]) -> threading.Event:
        """Start a function in the thread and return. The event is set when it ends; if it fails, the process exits."""
        ended = threading.Event()

        def work() -> None:
            _exit_on_failure(function)
            ended.set()

        self._work.put(work)
        return ended

    def _serve(self) -> None:
        while True:
            self._work.get()()


class EngineLoop:
    """Runs the leader's engine, in the thread that loaded it. All methods may be called from any thread."""

    def __init__(self, engine: Engine, *, abandon_after_s: float, thread: EngineThread | None = None) -> None:
        self.engine = engine
        self._abandon_after_s = abandon_after_s
        self._changed = threading.Condition()
        self._commands: list[Callable[[], None]] = []  # from the server; run between steps
        self._events: list[TokenEvent] = []
        self._deadlines: list[tuple[float, Request]] = []  # unordered: few requests have a timeout
        self._last_contact = time.monotonic()
        self._num_polling = 0
        self._stopping = False
        self._thread = thread or EngineThread()
        self._ended: threading.Event | None = None

    def start(self) -> None:
        self._ended = self._thread.run(self._run)

    def submit(self, *requests: Request) -> None:
        """Queue requests. If one cannot run, or the queue has no room for all, the outputs of all end with
        finish_reason "error".

        Their timeouts start now.
        """
        arrival = time.monotonic()
        self._post(lambda: self._add(requests, arrival))

    def cancel(self, request_id: str, index: int | None = None) -> None:
        """Drop a request, or one of its outputs. Its earlier events may still be polled."""
        self._post(lambda: self._cancel(request_id, index))

    def poll(self, timeout_s: float) -> list[TokenEvent]:
        """All events since the last poll, oldest first; waits up to timeout_s for the first."""
        with self._changed:
            self._num_polling += 1
            try:
                self._changed.wait_for(lambda: bool(self._events), timeout_s)
            finally:
                self._last_contact = time.monotonic()
                self._num_polling -= 1  # afterwards: the loop reads both without the lock
            events, self._events = self._events, []
            return events

    def stats(self) -> EngineStats:
        """The engine's statistics."""
        return self.engine.stats()

    def stop(self) -> None:
        """End the loop and release the followers."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._ended is not None:
            self._ended.wait()

    def _post(self, command: Callable[[], None]) -> None:
        with self._changed:
            self._last_contact = time.monotonic()
            self._commands.append(command)
            self._changed.notify_all()

    def _run(self) -> None:
        heartbeat_s = self.engine.config.heartbeat_s
        while True:
            with self._changed:
                idle = not self.engine.num_requests
                if idle:
                    self._changed.wait_for(lambda: self._commands or self._stopping, heartbeat_s)
                commands, self._commands = self._commands, []
                stopping = self._stopping
            if stopping:
                break
            for command in commands:
                command()
            self._cancel_abandoned()
            self._end_timed_out()
            if self.engine.num_requests:
                self._emit(self.engine.step())
            else:
                self.engine.heartbeat()
        self.engine.release()

    def _add(self, requests: Items[Request], arrival: float) -> None:
        names = ", ".join(request.id for request in requests)
        try:
            self.engine.add_all(requests, arrival)
        except QueueFull:
            log.info("request %s refused: the queue is full", names)
            self._emit(_final_events(requests, FinishReason.ERROR, "queue_full"))
        except ValueError as error:
            log.error("request %s cannot run: %s", names, error)
            self._emit(_final_events(requests, FinishReason.ERROR, "cannot_run"))
        else:
            self._deadlines += [(arrival + one.timeout_s, one) for one in requests if one.timeout_s is not None]

    def _cancel(self, request_id: str, index: int | None) -> None:
        if self.engine.cancel(request_id, index):
            log.info("request %s%s cancelled", request_id, "" if index is None else f", output {index},")

    def _cancel_abandoned(self) -> None:
        """Cancel all requests if nobody polls any more: the last client's disconnection is never reported."""
        if self._num_polling or not self.engine.num_requests:
            return
        if time.monotonic() - self._last_contact > self._abandon_after_s:
            log.info("nobody has polled for %g s: cancelling all requests", self._abandon_after_s)
            for request_id in self.engine.scheduler.request_ids():
                self._end(request_id, FinishReason.CANCELLED)

    def _end_timed_out(self) -> None:
        """End requests that have reached their timeout; their output so far is kept."""
        if not self._deadlines:
            return
        now = time.monotonic()
        scheduler = self.engine.scheduler
        for deadline, request in self._deadlines:
            if deadline <= now and scheduler.is_current(request):
                log.info("request %s timed out after %g s", request.id, request.timeout_s)
                self._end(request.id, FinishReason.TIMEOUT)
        self._deadlines = [one for one in self._deadlines if scheduler.is_current(one[1])]

    def _end(self, request_id: str, reason: FinishReason) -> None:
        active = self.engine.scheduler.active_outputs(request_id)
        self.engine.cancel(request_id)
        self._emit([TokenEvent(request_id, None, reason, index=index) for index in active])

    def _emit(self, events: list[TokenEvent]) -> None:
        if events:
            with self._changed:
                self._events.extend(events)
                self._changed.notify_all()


def _final_events(requests: Items[Request], reason: FinishReason, error: str) -> list[TokenEvent]:
    """An event that ends each of the requests' outputs."""
    return [
        TokenEvent(request.id, None, reason, error, index) for request in requests for index in range(request.params.n)
    ]


def _exit_on_failure(run: Callable[[], None]) -> None:
    """Exit this rank if `run` fails: the group needs every rank at every step."""
    try:
        run()
    except PeerLost as error:
        log.critical("%s; this rank exits so that the group is restarted", error)
        exit_rank(EXIT_STEP_FAILED)
    except BaseException:
        log.critical("the engine failed; this rank exits so that the group is restarted", exc_info=True)
        exit_rank(EXIT_STEP_FAILED)
