"""Runs a command: argument parsing by python-fire, errors as one line on stderr."""

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
from types import NoneType
from typing import Any, NoReturn, get_args

import fire
from fire import decorators

from llama_tp.cli.settings import WrongArguments

decorators.FIRE_METADATA = "__fire_metadata__"  # without the underscores, --help would list it as a command

_RANK_0_GRACE_S = 5.0
"""How long other ranks wait for rank 0 to print the error and exit, which makes torchrun end all ranks. A rank still
running after that is the only one with an error, and prints its own."""


def run_command(function: Callable[..., Any] | Mapping[str, Any], name: str | None = None) -> NoReturn:
    """Run a function with the command line's arguments. User and disk errors give exit code 1, WrongArguments 2.

    Functions that run on several ranks raise on all of them, so under torchrun rank 0 prints the error for all.
    """
    _escape_unprintable()
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
            time.sleep(_RANK_0_GRACE_S + 0.1 * rank)
        line = "; ".join(str(error).splitlines()) or type(error).__name__
        print(f"{name or os.path.basename(sys.argv[0])}: {line}", file=sys.stderr)
        return 2 if isinstance(error, WrongArguments) else 1
    except KeyboardInterrupt:
        return 130
    return 0


def _accept(entry: Any, work: list[Callable[[], Any]]) -> Any:
    """The entry, with calls recorded in `work` instead of made, until python-fire has parsed the whole command line.
    Otherwise fire would call a function first and report a misspelled --tempreture afterwards.

    Fire parses every argument as a Python literal; here, those annotated str are always text, and those annotated
    `bool | str` text, true or false.
    """
    if isinstance(entry, Mapping):
        return {name: _accept(one, work) for name, one in entry.items()}

    @wraps(entry)
    def accept(*args: Any, **kwargs: Any) -> None:
        work.append(partial(entry, *args, **kwargs))

    signature = inspect.signature(entry, eval_str=True)
    accept.__signature__ = signature  # type: ignore[attr-defined]  # with types instead of their names, for --help
    texts = {name: str for name, one in signature.parameters.items() if one.annotation in (str, str | None)}
    switches = {name: _switch for name, one in signature.parameters.items() if _is_switch(one.annotation)}
    return decorators.SetParseFns(**texts, **switches)(accept)


def _is_switch(annotation: object) -> bool:
    """Whether an option is true, false or a word."""
    return set(get_args(annotation)) - {NoneType} == {bool, str}


def _switch(text: str) -> bool | str:
    """`--compile`, which fire reads as --compile=True, and true or false in any case; any other text as it is."""
    return {"true": True, "false": False}.get(text.lower(), text)


def _escape_unprintable() -> None:
    """Print characters that the terminal's encoding lacks as \\xe9, instead of failing."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


_CLEAN_UP_S = 5.0
"""How long a command may clean up after SIGTERM before it is forced to exit."""


@contextmanager
def _ending_at_sigterm() -> Iterator[None]:
    """Exit on SIGTERM, or when the terminal is closed, cleaning up as after an error; on SIGTERM even if the main
    thread does not return from a collective."""
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
    """For a command that must end other processes before it exits, and never waits in a collective."""
    signal.set_wakeup_fd(-1)


def _end(number: int, _frame: object) -> NoReturn:
    sys.exit(128 + number)


def _end_late(arrivals: int, has_ended: threading.Event) -> None:
    """Unlike Python signal handlers, this does not need the main thread to run."""
    while signal.SIGTERM not in os.read(arrivals, 64):
        pass
    if not has_ended.wait(_CLEAN_UP_S):
        os._exit(128 + signal.SIGTERM)
