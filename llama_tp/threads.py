"""How many CPU threads a rank gets, and how long idle ones spin. Imports no torch: some of this must run before it."""

from __future__ import annotations

import logging
import os
from collections.abc import MutableMapping

from llama_tp.control_groups import cpu_quotas

log = logging.getLogger(__name__)

SPIN_COUNT = 1000
"""libgomp's GOMP_SPINCOUNT. By default idle threads spin indefinitely unless OMP_NUM_THREADS exceeds the cores. With
another process on these cores, each parallel region then waits until that process has used its time slice. A bounded
spin costs 8 to 15 % on an otherwise idle machine (measured: docs/performance.md)."""

_IO_THREADS = 4
"""Concurrent reads over all ranks of a host."""


def bound_spinning(environment: MutableMapping[str, str]) -> None:
    """Set the default for processes started with this environment, or for this process if it has not loaded torch yet.
    Keeps what the user has set."""
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))


def warn_of_spinning(num_threads: int) -> None:
    """Warn if this process was started without a bound: libgomp reads it when torch is loaded."""
    if num_threads > 1 and not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        log.warning(
            "idle threads spin indefinitely, which is slow if other processes use these cores; "
            "start the ranks with GOMP_SPINCOUNT=%d in the environment",
            SPIN_COUNT,
        )


def choose_num_threads(requested: int | None) -> int:
    """Threads for this rank: as requested, else its share of the available cores, or OMP_NUM_THREADS if less. Under
    torchrun an OMP_NUM_THREADS of 1 is ignored, because torchrun sets it if the user has not."""
    if requested is not None:
        return requested
    share = max(1, available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    inherited = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    if not inherited.isdecimal() or int(inherited) < 1 or ("TORCHELASTIC_RUN_ID" in os.environ and inherited == "1"):
        return share
    if int(inherited) > share:
        log.warning("OMP_NUM_THREADS=%s exceeds the %d core(s) of this rank; using %d", inherited, share, share)
    return min(int(inherited), share)


def num_io_threads() -> int:
    """Concurrent reads or hashes of this rank: its share of the host's."""
    return max(1, _IO_THREADS // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def num_workers() -> int:
    """Threads of this rank that compute while they read or write, as hashing does."""
    return min(available_cores(), num_io_threads())


def available_cores() -> int:
    """Cores that this process may use, by CPU affinity and control group quotas."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        cores = os.cpu_count() or 1
    return max(1, int(min([cores, *cpu_quotas()])))
