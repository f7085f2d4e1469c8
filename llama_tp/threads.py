"""How many CPU threads a rank gets, and how long its idle ones spin. Imports no torch: some of it must come before."""

from __future__ import annotations

import logging
import os
from collections.abc import MutableMapping

from llama_tp.control_groups import cpu_quotas

log = logging.getLogger(__name__)

SPIN_COUNT = 1000
"""libgomp's GOMP_SPINCOUNT. By default idle threads spin for as long as OMP_NUM_THREADS does not exceed the cores, and
with another process on these cores each parallel region waits until the scheduler has given the other one its time
slice. A bounded spin costs 8 to 15 % when the machine is idle (measured: docs/performance.md)."""


def bound_spinning(environment: MutableMapping[str, str]) -> None:
    """Add the default for processes that are started with this environment, or for this one if it has not loaded torch
    yet. What the user has set stands."""
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))


def warn_of_spinning(num_threads: int) -> None:
    """Say so if this process was started without a bound: libgomp reads it when torch is loaded."""
    if num_threads > 1 and not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        log.warning(
            "idle threads spin without bound, which is slow if other processes use these cores; "
            "start the ranks with GOMP_SPINCOUNT=%d in the environment",
            SPIN_COUNT,
        )


def choose_num_threads(requested: int | None) -> int:
    """Threads for this rank: what is requested, else its share of the available cores, or OMP_NUM_THREADS if that is
    less. torchrun sets OMP_NUM_THREADS to 1 where the user has not set it, so under torchrun a 1 means nothing."""
    if requested is not None:
        return requested
    share = max(1, available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    inherited = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    if not inherited.isdecimal() or int(inherited) < 1 or ("TORCHELASTIC_RUN_ID" in os.environ and inherited == "1"):
        return share
    if int(inherited) > share:
        log.warning("OMP_NUM_THREADS=%s is more than the %d core(s) of this rank; using %d", inherited, share, share)
    return min(int(inherited), share)


def available_cores() -> int:
    """Cores that this process may use: by its affinity and by the CPU quotas of its control groups."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        cores = os.cpu_count() or 1
    return max(1, int(min([cores, *cpu_quotas()])))
