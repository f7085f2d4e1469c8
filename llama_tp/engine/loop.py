"""The engine in a thread of its own, behind a mailbox: what a server talks to.

A step never waits for the server and the server never waits for a step: `submit` and `cancel` leave a note, `poll`
takes what has happened since it last looked. A failure of the group ends the process, so that whoever supervises it
starts the whole group afresh.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable

from llama_tp.engine.engine import Engine
from llama_tp.engine.request import FinishReason, Request, TokenEvent

log = logging.getLogger(__name__)

EXIT_STEP_FAILED = 70
"""Exit code of a rank whose step raised, or whose peers fell silent."""


class EngineLoop:
    """Runs the leader's engine. All methods may be called from any thread."""

    def __init__(self, engine: Engine, *, abandon_after_s: float) -> None:
        self.engine = engine
        self._abandon_after_s = abandon_after_s
        self._changed = threading.Condition()
        self._notes: list[Callable[[], None]] = []  # what the server wants of the engine; run between two steps
        self._events: list[TokenEvent] = []
        self._last_contact = time.monotonic()
        self._stopping = False
        self._thread = threading.Thread(target=_or_die, args=(self._run,), name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, request: Request) -> None:
        """Queue a request; a request that can never run comes back as an event with finish_reason "error"."""
        self._leave(lambda: self._add(request))

    def cancel(self, request_id: str) -> None:
        """Forget a request. Events it already caused may still be polled."""
        self._leave(lambda: self._cancel(request_id))

    def poll(self, timeout_s: float) -> list[TokenEvent]:
        """Everything that happened since the last poll, oldest first; waits up to timeout_s for something."""
        with self._changed:
            self._last_contact = time.monotonic()
            self._changed.wait_for(lambda: bool(self._events), timeout_s)
            self._last_contact = time.monotonic()
            events, self._events = self._events, []
            return events

    def stop(self) -> None:
        """End the thread and let the followers go."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._thread.join()

    def _leave(self, note: Callable[[], None]) -> None:
        with self._changed:
            self._last_contact = time.monotonic()
            self._notes.append(note)
            self._changed.notify_all()

    def _run(self) -> None:
        heartbeat_s = self.engine.config.heartbeat_s
        while True:
            with self._changed:
                idle = not self.engine.num_requests
                woken = not idle or self._changed.wait_for(lambda: self._notes or self._stopping, heartbeat_s)
                notes, self._notes = self._notes, []
                stopping = self._stopping
            if stopping:
                break
            for note in notes:
                note()
            self._cancel_abandoned()
            if self.engine.num_requests:
                self._tell(self.engine.step())
            elif not woken:
                self.engine.heartbeat()
        self.engine.release()

    def _add(self, request: Request) -> None:
        try:
            self.engine.add(request)
        except ValueError as error:
            log.error("request %s cannot run: %s", request.id, error)
            self._tell([TokenEvent(request.id, None, FinishReason.ERROR, "cannot_run")])

    def _cancel(self, request_id: str) -> None:
        if self.engine.cancel(request_id):
            log.info("request %s cancelled", request_id)

    def _cancel_abandoned(self) -> None:
        """The last client to leave is never reported: nobody polls any more."""
        if self.engine.num_requests and time.monotonic() - self._last_contact > self._abandon_after_s:
            log.info("nobody has polled for %g s: cancelling all requests", self._abandon_after_s)
            for request_id in self.engine.scheduler.request_ids():
                self.engine.cancel(request_id)
                self._tell([TokenEvent(request_id, None, FinishReason.CANCELLED)])

    def _tell(self, events: list[TokenEvent]) -> None:
        if events:
            with self._changed:
                self._events.extend(events)
                self._changed.notify_all()


def follow_in_thread(engine: Engine) -> threading.Thread:
    """Follow the leader's plans beside a server that wants this thread back."""
    thread = threading.Thread(target=_or_die, args=(engine.follow,), name="follower", daemon=True)
    thread.start()
    return thread


def _or_die(run: Callable[[], None]) -> None:
    """The group has to agree step by step; a rank that cannot go on must not linger."""
    try:
        run()
    except BaseException:
        log.critical("the engine failed; this rank ends so that the group is started afresh", exc_info=True)
        logging.shutdown()
        os._exit(EXIT_STEP_FAILED)
