"""Devices as their vendors describe them, and how much of that can be reached."""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass

from llama_tp import control_groups
from llama_tp.threads import available_cores

GIB = 2**30

REACHABLE_BANDWIDTH = 0.9
"""Share of the data sheet's memory bandwidth that a kernel can read. Measured: 3,064 of 3,350 GB/s on an H100, 4,339 of
4,800 on an H200 (docs/performance.md)."""
REACHABLE_FLOPS = 0.8
"""Share of the data sheet's operations that a large matrix product reaches. Measured: 780 of 989 TFLOP/s on an H100,
793 on an H200 (docs/performance.md)."""

_NVLINK_LATENCY = 23e-6
"""Seconds of a small all-reduce by NCCL over NVLink (torchtitan's measurements in vLLM)."""
_PCIE_LATENCY = 40e-6
"""Seconds of a small all-reduce by NCCL over PCIe. An assumption: it depends on the host."""
_SHARED_MEMORY_LATENCY = 30e-6
"""Seconds of a small all-reduce between processes of a host. Measured: docs/performance.md."""

_CPU_BANDWIDTH_PER_CORE = 17e9
_CPU_MAX_BANDWIDTH = 200e9
_CPU_FLOPS_PER_CORE = 0.9e12
"""Measured on cores with AMX, as reached. A core without it has a tenth."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One accelerator, or a host whose CPUs and memory all ranks share."""

    name: str
    type: str
    """cuda or cpu, as PyTorch calls it."""
    memory: int
    """Bytes, as the driver reports them."""
    bandwidth: float
    """Bytes per second that can be read from memory."""
    flops: float
    """Dense 16-bit floating-point operations per second that can be reached."""
    link: float
    """Bytes per second to the other devices, in one direction."""
    latency: float
    """Seconds of a small all-reduce."""
    per_host: int
    """Devices that a host usually has."""
    source: str
    """Where memory, bandwidth and operations come from."""

    @property
    def ranks_share_it(self) -> bool:
        """Whether more ranks divide one device instead of adding devices."""
        return self.type == "cpu"


def _gpu(
    name: str,
    gib: float,
    gb_per_s: float,
    tflops: float,
    link_gb_per_s: float,
    source: str,
    *,
    latency: float = _PCIE_LATENCY,
    has_inline_ecc: bool = False,
) -> Device:
    """From the figures of a data sheet: `tflops` dense, for 16-bit inputs accumulated in 32 bits.

    `has_inline_ecc`: check bits take a sixteenth of the memory, as with GDDR6 in data centers.
    """
    return Device(
        name=name,
        type="cuda",
        memory=int(gib * GIB * (15 / 16 if has_inline_ecc else 1)),
        bandwidth=REACHABLE_BANDWIDTH * gb_per_s * 1e9,
        flops=REACHABLE_FLOPS * tflops * 1e12,
        link=link_gb_per_s * 1e9,
        latency=latency,
        per_host=8,
        source=source,
    )


_NVIDIA = "https://www.nvidia.com/en-us/data-center"
_PCIE_4, _PCIE_5 = 32, 64
"""GB/s of 16 lanes in one direction."""

DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        _gpu("h100", 80, 3350, 989, 450, f"{_NVIDIA}/h100/ (SXM)", latency=_NVLINK_LATENCY),
        _gpu("h200", 141, 4800, 989, 450, f"{_NVIDIA}/h200/ (SXM)", latency=_NVLINK_LATENCY),
        _gpu("a100-40", 40, 1555, 312, 300, f"{_NVIDIA}/a100/ (SXM)", latency=_NVLINK_LATENCY),
        _gpu("a100-80", 80, 2039, 312, 300, f"{_NVIDIA}/a100/ (SXM)", latency=_NVLINK_LATENCY),
        _gpu("l4", 24, 300, 121, _PCIE_4, f"{_NVIDIA}/l4/", has_inline_ecc=True),
        _gpu("l40s", 48, 864, 362, _PCIE_4, f"{_NVIDIA}/l40s/", has_inline_ecc=True),
        _gpu("a10", 24, 600, 125, _PCIE_4, f"{_NVIDIA}/products/a10-gpu/", has_inline_ecc=True),
        _gpu("rtx3090", 24, 936, 71, _PCIE_4, "NVIDIA Ampere GA102 GPU architecture whitepaper, appendix A"),
        _gpu("rtx4090", 24, 1008, 165, _PCIE_4, "NVIDIA Ada GPU architecture whitepaper, appendix A"),
        _gpu("rtx5090", 32, 1792, 209.5, _PCIE_5, "NVIDIA RTX Blackwell GPU architecture whitepaper, appendix A"),
        _gpu("mi300x", 192, 5300, 1307, 448, "AMD Instinct MI300X data sheet", latency=_NVLINK_LATENCY),
    )
}
"""Name -> GPU."""


def find_device(name: str) -> Device:
    """A device by name; `cpu` is this host. ValueError lists the names."""
    if name == "cpu":
        return _this_host()
    if name in DEVICES:
        return DEVICES[name]
    known = (*DEVICES, "cpu")
    close = difflib.get_close_matches(name.lower(), known, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise ValueError(f"device={name!r} is not in the table of devices; {hint}known: {', '.join(known)}")


def _this_host() -> Device:
    cores = available_cores()
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    bandwidth = min(cores * _CPU_BANDWIDTH_PER_CORE, _CPU_MAX_BANDWIDTH)
    return Device(
        name="cpu",
        type="cpu",
        memory=min([memory, *control_groups.free_memory()]),
        bandwidth=bandwidth,
        flops=cores * _CPU_FLOPS_PER_CORE,
        link=bandwidth,
        latency=_SHARED_MEMORY_LATENCY,
        per_host=cores,
        source="memory of this host; bandwidth and operations per core measured, docs/performance.md",
    )
