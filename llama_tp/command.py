"""The edge of a command: python-fire outside, one line on stderr for what went wrong."""

from __future__ import annotations

import inspect
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import fire
from fire.decorators import SetParseFns

_SPEAK_S = 0.5
"""torchrun ends all ranks as soon as one has ended: this long the others leave rank 0 to print its line."""


def run_command(function: Callable[..., Any] | Mapping[str, Any], name: str | None = None) -> None:
    """Run a function with the arguments of the command line. What a user or a disk can cause ends in exit code 1.

    Under torchrun only rank 0 prints the line: functions that run on several ranks raise on all of them.
    """
    signal.signal(signal.SIGTERM, _end)
    try:
        fire.Fire(_as_typed(function), name=name)
    except (ValueError, OSError) as error:
        if os.environ.get("RANK", "0") == "0":
            line = "; ".join(str(error).splitlines()) or type(error).__name__
            print(f"{os.path.basename(sys.argv[0])}: {line}", file=sys.stderr)
        else:
            time.sleep(_SPEAK_S)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def _as_typed(entry: Any) -> Any:
    """python-fire reads every argument as a Python literal; those annotated str are text, whatever they look like."""
    if isinstance(entry, Mapping):
        return {name: _as_typed(one) for name, one in entry.items()}
    parameters = inspect.signature(entry).parameters
    texts = {name: str for name, one in parameters.items() if str(one.annotation).startswith("str")}
    return SetParseFns(**texts)(entry)


def _end(_signal: int, _frame: object) -> NoReturn:
    """A SIGTERM cleans up as an error does."""
    sys.exit(143)
