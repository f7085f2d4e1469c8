"""All ranks continue, or all stop: otherwise an error on one rank leaves the others waiting in a collective."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


class TransientError(ValueError):
    """A failure that may go away by itself: the same step can succeed later, although the user has changed nothing."""


def is_permanent(error: BaseException) -> bool:
    """Whether the error will come again until the user changes something. So it is with a ValueError, unless memory, a
    disk or a process had a part in it."""
    return isinstance(error, ValueError) and not any(isinstance(one, _TRANSIENT) for one in _chain(error))


_TRANSIENT = (TransientError, OSError, MemoryError, RuntimeError)
"""torch's errors, such as that of too little memory on a GPU, are RuntimeErrors."""


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and those that led to it, also where `from None` hides them from the reader."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def agree(step: Callable[[], T]) -> T:
    """Run `step` on every rank and return the local result. If it fails on any rank: ValueError on all with the first
    reason, and its rank unless all have the same reason; a TransientError unless all reasons are permanent.

    Without a process group this is a plain call, and its errors propagate unchanged.
    """
    if not dist.is_initialized():
        return step()
    result: T | None = None
    problem: str | None = None
    permanent = True
    try:
        result = step()
    except Exception as error:  # includes torch's out-of-memory error, a RuntimeError
        problem, permanent = one_line(error), is_permanent(error)
    gathered = gather((problem, permanent))
    problems = [reason for reason, _ in gathered]
    kind = ValueError if all(permanent for _, permanent in gathered) else TransientError
    for rank, reason in enumerate(problems):
        if reason is not None:
            raise kind(reason if len(set(problems)) == 1 else f"rank {rank}: {reason}")
    return result  # type: ignore[return-value]  # no rank failed, so step returned


def one_line(error: Exception) -> str:
    """The error in one line, for a log or another rank, with its type unless it is a user error."""
    text = "; ".join(str(error).splitlines())[:500]
    return text if text and isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: {text}"


def gather(value: T) -> list[T]:
    """Every rank's value, in rank order, on every rank. TransientError if a rank is gone."""
    if not dist.is_initialized():
        return [value]
    values: list[T] = [value] * dist.get_world_size()
    try:
        dist.all_gather_object(values, value)
    except RuntimeError as error:
        raise TransientError(f"another rank exited: {str(error).splitlines()[0]}") from None
    return values
