"""The edge of a command: python-fire outside, one line on stderr for what went wrong."""

from __future__ import annotations

import inspect
import io
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any, NoReturn

import fire
from fire import decorators

decorators.FIRE_METADATA = "__fire_metadata__"  # by its own name, --help lists it among the commands

_SPEAK_S = 5.0
"""torchrun ends all ranks when one exits; the others wait this long so that rank 0 can print its line and exit. A rank
that is still running afterwards is the only one with a problem, and prints its own."""


def run_command(function: Callable[..., Any] | Mapping[str, Any], name: str | None = None) -> NoReturn:
    """Run a function with the arguments of the command line. What a user or a disk can cause ends in exit code 1.

    Functions that run on several ranks raise on all of them, so under torchrun rank 0 prints the line for all.
    """
    _print_anything()
    with _ending_at_sigterm():
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            sys.exit(_run(function, name))
        from llama_tp.parallel.launch import exit_rank

        try:
            status = _run(function, name)
        except SystemExit as end:
            status = int(end.code or 0)
        except BaseException:
            traceback.print_exc()
            status = 1
        exit_rank(status)


def _run(function: Callable[..., Any] | Mapping[str, Any], name: str | None) -> int:
    """The command's exit code."""
    work: list[Callable[[], Any]] = []
    try:
        fire.Fire(_accept(function, work), name=name)
        for call in work:
            call()
    except (ValueError, OSError) as error:
        rank = int(os.environ.get("RANK", "0"))
        if rank > 0:
            time.sleep(_SPEAK_S + 0.1 * rank)
        line = "; ".join(str(error).splitlines()) or type(error).__name__
        print(f"{name or os.path.basename(sys.argv[0])}: {line}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _accept(entry: Any, work: list[Callable[[], Any]]) -> Any:
    """What python-fire sees instead of the entry: calls are added to `work`, to be made when it has understood the
    whole line. It would call a function first and only then say that --tempreture means nothing to it.

    It reads every argument as a Python literal; those annotated str are text, whatever they look like.
    """
    if isinstance(entry, Mapping):
        return {name: _accept(one, work) for name, one in entry.items()}

    @wraps(entry)
    def accept(*args: Any, **kwargs: Any) -> None:
        work.append(partial(entry, *args, **kwargs))

    signature = inspect.signature(entry, eval_str=True)
    accept.__signature__ = signature  # type: ignore[attr-defined]  # with types instead of their names, for --help
    texts = {name: str for name, one in signature.parameters.items() if one.annotation in (str, str | None)}
    return decorators.SetParseFns(**texts)(accept)


def _print_anything() -> None:
    """A character that the terminal's encoding lacks is shown as \\xe9, and does not end the command."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


_CLEAN_UP_S = 5.0
"""How long a command gets to clean up after SIGTERM before it is ended where it stands."""


@contextmanager
def _ending_at_sigterm() -> Iterator[None]:
    """End at SIGTERM, or when the terminal is closed, cleaning up as after an error; at SIGTERM even if the main thread
    does not return from a collective."""
    signal.signal(signal.SIGTERM, _end)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # nohup ignores it
        signal.signal(signal.SIGHUP, _end)
    arrivals, numbers = os.pipe()
    os.set_blocking(numbers, False)
    signal.set_wakeup_fd(numbers, warn_on_full_buffer=False)
    has_ended = threading.Event()
    threading.Thread(target=_end_late, args=(arrivals, has_ended), name="sigterm", daemon=True).start()
    try:
        yield
    finally:
        has_ended.set()
        signal.set_wakeup_fd(-1)


def allow_slow_shutdown() -> None:
    """For a command that has to end other processes before itself, and never waits in a collective."""
    signal.set_wakeup_fd(-1)


def _end(number: int, _frame: object) -> NoReturn:
    sys.exit(128 + number)


def _end_late(arrivals: int, has_ended: threading.Event) -> None:
    """Python runs signal handlers between two instructions of the main thread; this one needs no main thread."""
    while signal.SIGTERM not in os.read(arrivals, 64):
        pass
    if not has_ended.wait(_CLEAN_UP_S):
        os._exit(128 + signal.SIGTERM)
