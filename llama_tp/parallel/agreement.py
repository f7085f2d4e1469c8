"""All ranks continue, or all stop: otherwise an error on one rank leaves the others waiting in a collective."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def agree(step: Callable[[], T]) -> T:
    """Run `step` on every rank and return the local result. If it fails on any rank: ValueError on all with the first
    reason, and its rank unless all have the same reason.

    Without a process group this is a plain call, and its errors propagate unchanged.
    """
    if not dist.is_initialized():
        return step()
    result: T | None = None
    problem: str | None = None
    try:
        result = step()
    except Exception as error:  # includes torch's out-of-memory error, a RuntimeError
        problem = one_line(error)
    problems = gather(problem)
    for rank, reason in enumerate(problems):
        if reason is not None:
            raise ValueError(reason if len(set(problems)) == 1 else f"rank {rank}: {reason}")
    return result  # type: ignore[return-value]  # no rank failed, so step returned


def one_line(error: Exception) -> str:
    """The error in one line, for a log or another rank, with its type unless it is a user error."""
    text = "; ".join(str(error).splitlines())[:500]
    return text if text and isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: {text}"


def gather(value: T) -> list[T]:
    """Every rank's value, in rank order, on every rank. ValueError if a rank is gone."""
    if not dist.is_initialized():
        return [value]
    values: list[T] = [value] * dist.get_world_size()
    try:
        dist.all_gather_object(values, value)
    except RuntimeError as error:
        raise ValueError(f"another rank exited: {str(error).splitlines()[0]}") from None
    return values
