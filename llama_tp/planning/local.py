"""The devices of this machine, as `llama-tp serve` uses them."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from llama_tp.planning.devices import DEVICES, Device, find_device

DEVICE_KINDS = ("auto", "cpu", "cuda")
_DRIVERS = ("/proc/driver/nvidia", "/dev/kfd")
"""Of NVIDIA and AMD."""
_LIST_GPUS = """
import json, torch
found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
print(json.dumps([[one.name, one.total_memory] for one in found]))
"""


@dataclass(frozen=True, slots=True)
class LocalDevices:
    """Equal devices."""

    device: Device
    """One of them, with the memory of the smallest. Of a GPU the speed is not known: it is that of a slow one."""
    count: int
    """1 for the CPUs, which all ranks share."""


def automatic_size(n_heads: int, num_gpus: int) -> int:
    """The number of ranks for `--tp auto`: one per GPU, up to the model's query heads; one on CPUs.

    More ranks on CPUs add no bandwidth. On two idle cores, two ranks of one thread decode 16 % faster than one rank of
    two threads, but while other work shares the cores they are 26 % slower (docs/benchmarks.md).
    """
    return max(1, min(num_gpus, n_heads))


def local_devices(kind: str) -> LocalDevices:
    """The devices of a kind; `auto`: GPUs, if there are any. ValueError if there are none, or for an unknown kind."""
    if kind not in DEVICE_KINDS:
        raise ValueError(f"device={kind!r} must be one of {', '.join(DEVICE_KINDS)}")
    gpus = [] if kind == "cpu" else _gpus()
    if not gpus and kind == "cuda":
        raise ValueError("device='cuda', but PyTorch finds no GPU on this machine; use --device cpu")
    if not gpus:
        return LocalDevices(find_device("cpu"), 1)
    name, memory = min(gpus, key=lambda gpu: gpu[1])
    return LocalDevices(replace(DEVICES["l4"], name=name, memory=memory, source="the driver"), len(gpus))


def _gpus() -> list[tuple[str, int]]:
    """Name and bytes of memory of each. Asked in another process, so that this one holds no memory of theirs."""
    if not any(Path(driver).exists() for driver in _DRIVERS):
        return []
    done = subprocess.run([sys.executable, "-c", _LIST_GPUS], capture_output=True, text=True, check=False)
    try:
        return [(str(name), int(memory)) for name, memory in json.loads(done.stdout)]
    except (ValueError, TypeError):
        return []
