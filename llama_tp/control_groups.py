"""The limits of this process's control groups, versions 1 and 2: a container has less than its host shows.

https://docs.kernel.org/admin-guide/cgroup-v2.html, https://docs.kernel.org/admin-guide/cgroup-v1/memory.html and
https://docs.kernel.org/scheduler/sched-bwc.html
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

_ROOT = Path("/")


def cpu_quotas() -> Iterator[float]:
    """CPU quotas that apply to this process, in cores."""
    for folder in _groups("cpu"):
        with suppress(OSError, ValueError, ZeroDivisionError):
            if (folder / "cpu.max").is_file():
                quota, period = (folder / "cpu.max").read_text().split()
            else:
                quota, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
            if quota.isdecimal():
                yield int(quota) / int(period)


def free_memory() -> Iterator[int]:
    """Bytes that this process may still allocate under each memory limit that applies to it. Cached files do not count
    as used: the kernel drops them first."""
    for folder in _groups("memory"):
        with suppress(OSError, ValueError):
            if (folder / "memory.max").is_file():
                limit, used, cached = "memory.max", "memory.current", "inactive_file"
            else:
                limit, used, cached = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
            statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            in_use = int((folder / used).read_text()) - int(statistics.get(cached, 0))
            yield max(0, int((folder / limit).read_text()) - in_use)  # ValueError: "max", no limit


def _groups(controller: str) -> Iterator[Path]:
    """The folders of this process's groups for one controller, from its own to the root."""
    with suppress(OSError):
        for line in (_ROOT / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and controller not in controllers.split(","):
                continue
            names = dict.fromkeys([controllers, controller]) if controllers else [""]
            for mount in (Path("sys/fs/cgroup", name) for name in names):
                # In a container the mount may be rooted at the container's own group, whatever the path says.
                for group in (PurePosixPath(path), *PurePosixPath(path).parents):
                    yield _ROOT / mount / group.relative_to("/")
