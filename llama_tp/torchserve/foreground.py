"""A server that lives as long as the command that started it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from llama_tp.torchserve.server import TorchServe
from llama_tp.torchserve.watchdog import Watchdog


@contextmanager
def watched(server: TorchServe) -> Iterator[None]:
    """The server ends if this process is killed while the body runs."""
    watchdog = Watchdog(server.port)
    try:
        yield
    finally:
        watchdog.dismiss()


def run_until_ended(server: TorchServe, drain_s: float) -> None:
    """Print the log of a server that is ready, until it exits, which is a ServerError, or until a signal ends this
    command; then let open requests finish for up to drain_s."""
    try:
        server.wait_until_ended()
    except (KeyboardInterrupt, SystemExit):
        if drain_s > 0:
            _drain(server, drain_s)
        raise


def end(server: TorchServe) -> None:
    """Stop a server; a signal meanwhile kills it."""
    try:
        server.stop()
    except (KeyboardInterrupt, SystemExit):
        server.stop(grace_s=0)


def _drain(server: TorchServe, drain_s: float) -> None:
    _say(f"stopping: open requests have up to {drain_s:g} s to finish; press Ctrl-C again to end at once")
    try:
        if not server.drain(drain_s):
            _say(f"some requests were still open after {drain_s:g} s and are cut off")
    except (KeyboardInterrupt, SystemExit):
        server.stop(grace_s=0)


def _say(text: str) -> None:
    with suppress(OSError):  # the terminal may be closed
        print(text, file=sys.stderr, flush=True)
