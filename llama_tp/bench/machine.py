"""What a measurement has to know of the machine: caches, load, and the CPU time and memory that processes use."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_TICKS = os.sysconf("SC_CLK_TCK")
_CACHES = "/sys/devices/system/cpu"
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def load_average() -> float:
    """Runnable processes of the host, averaged over about a minute."""
    return os.getloadavg()[0]


def cpu_name() -> str:
    """The CPU's model, as /proc/cpuinfo gives it."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    """The model of the GPU or CPU."""
    if device.type != "cuda":
        return cpu_name()
    import torch

    return torch.cuda.get_device_name(device)


def last_level_cache(device: torch.device) -> int:
    """Bytes of the last cache before memory: a GPU's L2, or the last-level caches of all cores that this process may
    use. 0 if unknown."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    return _cpu_cache(Path(_CACHES), sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0])


def _cpu_cache(root: Path, cores: list[int]) -> int:
    """The sum over distinct caches of the highest level."""
    caches: dict[tuple[int, str], int] = {}
    for core in cores:
        for index in root.glob(f"cpu{core}/cache/index*"):
            try:
                level, shared = int((index / "level").read_text()), (index / "shared_cpu_list").read_text().strip()
                size = (index / "size").read_text().strip()
            except (OSError, ValueError):
                continue
            caches[level, shared] = int(size[:-1]) * _UNITS[size[-1]] if size[-1:] in _UNITS else int(size)
    last = max((level for level, _ in caches), default=0)
    return sum(size for (level, _), size in caches.items() if level == last)


def cpu_seconds(stat: str | Path) -> float:
    """utime + stime (proc(5), fields 14 and 15) in the stat file of a process with all its threads, or of a thread."""
    fields = Path(stat).read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def busy_seconds() -> float:
    """CPU seconds that the host's cores have spent on anything so far (proc_stat(5)), including what a hypervisor took
    from them. 0 where there is no /proc."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    except OSError:
        return 0.0
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields[:8])
    return (user + nice + system + irq + softirq + steal) / _TICKS


def forget_peak_memory(device: torch.device) -> None:
    """Let `peak_memory` of a GPU begin again. That of a process cannot."""
    if device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that PyTorch has allocated on a GPU, or this process's largest resident set."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
