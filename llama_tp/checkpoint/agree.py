"""All ranks go on, or all stop: without this, the error of one rank leaves the others waiting in a collective."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def agree(step: Callable[[], T]) -> T:
    """Run `step` on every rank and return its own result. If it fails on any rank: ValueError on all, the first reason.

    Only what a user or a disk can cause is passed on (ValueError, OSError, MemoryError); other exceptions are bugs and
    fly as they are. Without a process group it is a plain call.
    """
    if not dist.is_initialized():
        return step()
    result: T | None = None
    problem: str | None = None
    try:
        result = step()
    except (ValueError, OSError, MemoryError) as error:
        problem = str(error) or type(error).__name__
    problems = gather(problem)
    if first := next(filter(None, problems), None):
        raise ValueError(first)
    return result  # type: ignore[return-value]  # no problem anywhere, so step returned


def gather(value: T) -> list[T]:
    """Every rank's value, in rank order, on every rank. ValueError if a rank is gone."""
    if not dist.is_initialized():
        return [value]
    values: list[T] = [value] * dist.get_world_size()
    try:
        dist.all_gather_object(values, value)
    except RuntimeError as error:
        raise ValueError(f"another rank ended: {str(error).splitlines()[0]}") from None
    return values
