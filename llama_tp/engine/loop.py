"""The engine in a thread of its own, behind a mailbox: what a server talks to.

A step never waits for the server and the server never waits for a step: `submit` and `cancel` leave a note, `poll`
takes what has happened since it last looked. A failure of the group ends the process, so that whoever supervises it
starts the whole group afresh.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
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
    """The one thread of a process that computes: loading and packing weights as well as every step.

    OpenMP keeps a pool of threads for each thread that computes. Two pools on the same cores make a decode step take
    1.6 times as long (measured), so no other thread may touch a large tensor.
    """

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name="engine", daemon=True)
        self._thread.start()

    def call(self, function: Callable[[], T]) -> T:
        """What the function returns or raises, computed over there."""
        future: Future[T] = Future()

        def work() -> None:
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        self._work.put(work)
        return future.result()

    def run(self, function: Callable[[], None]) -> threading.Event:
        """Start a function and return. The event is set when it ends; if it fails, the process ends."""
        ended = threading.Event()

        def work() -> None:
            _or_die(function)
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
        self._notes: list[Callable[[], None]] = []  # what the server wants of the engine; run between two steps
        self._events: list[TokenEvent] = []
        self._deadlines: list[tuple[float, Request]] = []  # in no order: requests with a timeout are few
        self._last_contact = time.monotonic()
        self._num_polling = 0
        self._stopping = False
        self._thread = thread or EngineThread()
        self._ended: threading.Event | None = None

    def start(self) -> None:
        self._ended = self._thread.run(self._run)

    def submit(self, request: Request) -> None:
        """Queue a request; one that cannot run, or not now, comes back as an event with finish_reason "error".

        Its timeout counts from here.
        """
        arrival = time.monotonic()
        self._post(lambda: self._add(request, arrival))

    def cancel(self, request_id: str, index: int | None = None) -> None:
        """Forget a request, or one of its outputs. Events it already caused may still be polled."""
        self._post(lambda: self._cancel(request_id, index))

    def poll(self, timeout_s: float) -> list[TokenEvent]:
        """Everything that happened since the last poll, oldest first; waits up to timeout_s for something."""
        with self._changed:
            self._num_polling += 1
            try:
                self._changed.wait_for(lambda: bool(self._events), timeout_s)
            finally:
                self._num_polling -= 1
                self._last_contact = time.monotonic()
            events, self._events = self._events, []
            return events

    def stats(self) -> EngineStats:
        """How the engine is doing."""
        return self.engine.stats()

    def stop(self) -> None:
        """End the loop and let the followers go."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._ended is not None:
            self._ended.wait()

    def _post(self, note: Callable[[], None]) -> None:
        with self._changed:
            self._last_contact = time.monotonic()
            self._notes.append(note)
            self._changed.notify_all()

    def _run(self) -> None:
        heartbeat_s = self.engine.config.heartbeat_s
        while True:
            with self._changed:
                idle = not self.engine.num_requests
                if idle:
                    self._changed.wait_for(lambda: self._notes or self._stopping, heartbeat_s)
                notes, self._notes = self._notes, []
                stopping = self._stopping
            if stopping:
                break
            for note in notes:
                note()
            self._cancel_abandoned()
            self._end_late()
            if self.engine.num_requests:
                self._emit(self.engine.step())
            else:
                self.engine.heartbeat()
        self.engine.release()

    def _add(self, request: Request, arrival: float) -> None:
        try:
            self.engine.add(request)
        except QueueFull:
            log.info("request %s refused: the queue is full", request.id)
            self._emit(_ends(request, FinishReason.ERROR, "queue_full"))
        except ValueError as error:
            log.error("request %s cannot run: %s", request.id, error)
            self._emit(_ends(request, FinishReason.ERROR, "cannot_run"))
        else:
            if request.timeout_s is not None:
                self._deadlines.append((arrival + request.timeout_s, request))

    def _cancel(self, request_id: str, index: int | None) -> None:
        if self.engine.cancel(request_id, index):
            log.info("request %s%s cancelled", request_id, "" if index is None else f", output {index},")

    def _cancel_abandoned(self) -> None:
        """The last client to leave is never reported: nobody polls any more."""
        if self._num_polling or not self.engine.num_requests:
            return
        if time.monotonic() - self._last_contact > self._abandon_after_s:
            log.info("nobody has polled for %g s: cancelling all requests", self._abandon_after_s)
            for request_id in self.engine.scheduler.request_ids():
                self._end(request_id, FinishReason.CANCELLED)

    def _end_late(self) -> None:
        """End the requests whose time is up; what they have generated stands."""
        if not self._deadlines:
            return
        now = time.monotonic()
        scheduler = self.engine.scheduler
        for deadline, request in self._deadlines:
            if deadline <= now and scheduler.is_current(request):
                log.info("request %s ended after its %g s", request.id, request.timeout_s)
                self._end(request.id, FinishReason.TIMEOUT)
        self._deadlines = [late for late in self._deadlines if scheduler.is_current(late[1])]

    def _end(self, request_id: str, reason: FinishReason) -> None:
        active = self.engine.scheduler.active_outputs(request_id)
        self.engine.cancel(request_id)
        self._emit([TokenEvent(request_id, None, reason, index=index) for index in active])

    def _emit(self, events: list[TokenEvent]) -> None:
        if events:
            with self._changed:
                self._events.extend(events)
                self._changed.notify_all()


def _ends(request: Request, reason: FinishReason, error: str) -> list[TokenEvent]:
    """The end of each of a request's outputs."""
    return [TokenEvent(request.id, None, reason, error, index) for index in range(request.params.n)]


def _or_die(run: Callable[[], None]) -> None:
    """The group has to agree step by step; a rank that cannot go on must not linger."""
    try:
        run()
    except PeerLost as error:
        log.critical("%s; this rank ends so that the group is started afresh", error)
        exit_rank(EXIT_STEP_FAILED)
    except BaseException:
        log.critical("the engine failed; this rank ends so that the group is started afresh", exc_info=True)
        exit_rank(EXIT_STEP_FAILED)
