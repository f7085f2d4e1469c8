"""The edge of a command: python-fire outside, one line on stderr for what went wrong."""

from __future__ import annotations

import inspect
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial, wraps
from typing import Any, NoReturn

import fire
from fire import decorators

decorators.FIRE_METADATA = "__fire_metadata__"  # by its own name, --help lists it among the commands

_SPEAK_S = 0.5
"""torchrun ends all ranks as soon as one has ended: this long the others leave rank 0 to print its line."""


def run_command(function: Callable[..., Any] | Mapping[str, Any], name: str | None = None) -> NoReturn:
    """Run a function with the arguments of the command line. What a user or a disk can cause ends in exit code 1.

    Under torchrun only rank 0 prints the line: functions that run on several ranks raise on all of them.
    """
    signal.signal(signal.SIGTERM, _end)
    status = _run(function, name)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        from llama_tp.parallel.launch import leave

        leave(status)
    sys.exit(status)


def _run(function: Callable[..., Any] | Mapping[str, Any], name: str | None) -> int:
    """The command's exit code."""
    work: list[Callable[[], Any]] = []
    try:
        fire.Fire(_accept(function, work), name=name)
        for call in work:
            call()
    except (ValueError, OSError) as error:
        if os.environ.get("RANK", "0") == "0":
            line = "; ".join(str(error).splitlines()) or type(error).__name__
            print(f"{os.path.basename(sys.argv[0])}: {line}", file=sys.stderr)
        else:
            time.sleep(_SPEAK_S)
        return 1
    except KeyboardInterrupt:
        return 130
    except SystemExit as end:
        return int(end.code or 0)
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


def _end(_signal: int, _frame: object) -> NoReturn:
    """A SIGTERM cleans up as an error does."""
    sys.exit(143)
