"""A progress bar in bytes on stderr; silent if stderr is not a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

Advance = Callable[[int], None]
"""Called with the number of bytes just processed."""


def no_progress(_size: int) -> None:
    """The Advance that shows nothing."""


@contextmanager
def byte_progress(label: str, total: int, *, enabled: bool = True) -> Iterator[Advance]:
    """Show `label` with a bar, the speed and the remaining time while the body runs."""
    console = Console(stderr=True)
    if not (enabled and console.is_terminal):
        yield no_progress
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(label, total=total)
        yield lambda size: progress.advance(task, size)
