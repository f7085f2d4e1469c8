"""Draining, which TorchServe cannot do: the leader refuses new requests and says when the open ones have ended.

The command that stops a server asks by creating a file in the server's private folder. The leader, which has created
one there at its start, answers with another. That works while nobody calls handle(), and for a command that did not
start the server.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from time import monotonic, sleep
from typing import Protocol

ANSWER_FOLDER = "LLAMA_TP_SERVE_FILES"
"""Environment variable of processes started by `llama-tp serve`: the folder of these files."""
_LED, _ASKED, _DRAINED = "led", "drain", "drained"
_PERIOD_S = 0.1
_DELIVERY_S = 0.3
"""How long TorchServe may take to send the last replies."""

log = logging.getLogger(__name__)


class Drainable(Protocol):
    """A service, as far as it is drained."""

    @property
    def is_idle(self) -> bool:
        """Whether no request is open."""
        ...

    def drain(self) -> None:
        """Refuse new requests."""
        ...


def drain_on_demand(service: Drainable) -> None:
    """On the leader: watch for `drain`, in a thread. Does nothing if the server was not started by `llama-tp serve`."""
    if folder := os.environ.get(ANSWER_FOLDER):
        Path(folder, _LED).touch(mode=0o600)
        threading.Thread(target=_serve_demand, args=(service, Path(folder)), name="drain", daemon=True).start()


def forget_drain(folder: Path) -> None:
    """Remove what an earlier server left, so that the next one is not drained at its start."""
    for name in (_LED, _ASKED, _DRAINED):
        with suppress(FileNotFoundError):
            (folder / name).unlink()


def drain(folder: Path, timeout_s: float, meanwhile: Callable[[], object] = lambda: None) -> bool:
    """Make a server refuse new requests, and wait for its open ones. False if some were open after timeout_s, or,
    at once, if the server is still loading its model.

    `meanwhile` is called several times a second.
    """
    if not (folder / _LED).exists():
        return False
    deadline = monotonic() + timeout_s
    (folder / _ASKED).touch(mode=0o600)
    while not (folder / _DRAINED).exists():
        if monotonic() > deadline:
            return False
        meanwhile()
        sleep(_PERIOD_S)
    return True


def _serve_demand(service: Drainable, folder: Path) -> None:
    while not (folder / _ASKED).exists():
        sleep(_PERIOD_S)
    log.info("draining: new requests are refused")
    service.drain()
    while not service.is_idle:
        sleep(_PERIOD_S)
    sleep(_DELIVERY_S)
    with suppress(OSError):  # the folder is removed if nobody waits any more
        (folder / _DRAINED).touch(mode=0o600)
