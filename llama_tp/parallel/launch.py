"""Join the group: from torchrun's environment to a rank, a device, a mesh and a `Comm`; and exit from it.

Ranks rendezvous over gloo, which works on every machine, and touch a device only after all have agreed that they can.
Otherwise a rank without its GPU would leave the others waiting in NCCL.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous

from llama_tp.parallel import shared_memory
from llama_tp.parallel.agreement import agree, gather
from llama_tp.parallel.comm import Comm, GroupComm, SingleComm
from llama_tp.parallel.interfaces import check_gloo_interfaces

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Group:
    """One rank's membership in the group of a model's ranks."""

    comm: Comm
    device: torch.device
    mesh: DeviceMesh | None
    """One-dimensional, axis "tp"; None for a group of one."""


_LOAD_TIMEOUT = timedelta(hours=1)
"""Timeout of the default group: ranks wait for each other while they read a checkpoint."""


def resolve_device(name: str) -> torch.device:
    """The device of this rank. ValueError if it does not exist."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    available = torch.cuda.device_count()
    if local_rank >= available:
        raise ValueError(
            f"device=cuda: local rank {local_rank} needs GPU number {local_rank}, but only {available} are visible; "
            "reduce nproc-per-node, or use device: cpu"
        )
    return torch.device("cuda", local_rank)


def join(
    device: str = "auto", *, timeout_s: float = 20.0, lead: bool | None = None, deterministic: bool = False
) -> Group:
    """Join the group described by torchrun's environment, or a group of one without it. Calls `meet` if necessary.

    `lead`: whether this rank is the leader; exactly one must be. None: rank 0 is. A group of one leads itself and
    starts no process group. `timeout_s`: how long a step waits for a silent peer. `deterministic`: always sum in rank
    order. ValueError, on every rank, if any rank's device is unavailable.
    """
    meet()
    if not dist.is_initialized():
        return Group(comm=SingleComm(), device=resolve_device(device), mesh=None)
    here = agree(lambda: resolve_device(device))
    _require_one_kind(gather(here.type))
    leader = _agree_on_leader(dist.get_rank() == 0 if lead is None else lead)
    if here.type == "cuda":
        torch.cuda.set_device(here)
    mesh = init_device_mesh(here.type, (dist.get_world_size(),), mesh_dim_names=("tp",))
    return Group(comm=_make_comm(here, leader, timeout_s, deterministic), device=here, mesh=mesh)


_MEET_TIMEOUT_S = 300.0
"""How long ranks wait for each other to start. torchrun starts them together, but hosts may import at different
speeds."""
_REPORT_AFTER_S = 10.0
"""Log the missing ranks after this time, and again each time it has doubled."""


def meet(timeout: timedelta = _LOAD_TIMEOUT) -> None:
    """Wait for all ranks that torchrun started, and connect them over gloo. Does nothing for a group of one, or if they
    are already connected.

    From now on, a process started by torchrun dies with it. `timeout`: how long a rank may keep the others waiting
    while it loads or converts. ValueError if WORLD_SIZE is above 1 but torchrun did not start this process, or if a
    rank does not start.
    """
    if dist.is_initialized():
        return
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if not is_under_torchrun():
        if size > 1:
            raise ValueError(
                f"WORLD_SIZE={size} is set in the environment, but torchrun did not start this process; "
                f"unset WORLD_SIZE, or start it with: torchrun --nproc-per-node {size} ..."
            )
        return
    die_with_parent()
    if size == 1:
        return
    check_gloo_interfaces()
    rank = int(os.environ["RANK"])
    store: dist.Store
    if is_one_host() and sys.platform.startswith("linux"):
        # Keep traffic between ranks of one host on loopback, whatever its name resolves to.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        store = _host_store(size)
    else:
        store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=_MEET_TIMEOUT_S)))
    _await_all(store, rank, size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timeout)


def is_under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def is_one_host() -> bool:
    """Whether all ranks of the group run on this host."""
    return os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")


def _host_store(size: int) -> dist.Store:
    """A store in a private file shared by the ranks of one torchrun agent.

    torchrun's own store listens on all interfaces, and anyone who can reach it can write to it.
    """
    folder = Path(tempfile.gettempdir(), f"llama_tp.{os.getuid()}.ranks")
    folder.mkdir(mode=0o700, exist_ok=True)
    info = folder.lstat()
    if info.st_uid != os.getuid() or info.st_mode & 0o077 or folder.is_symlink():
        raise ValueError(f"{folder} must be a private folder that you own; remove it, or set TMPDIR")
    for old in folder.iterdir():  # left behind by killed ranks
        with suppress(FileNotFoundError):
            if time.time() - old.stat().st_mtime > _STALE_S:
                old.unlink()
    agent, started = _agent()
    ids = (agent, started, os.environ.get("MASTER_PORT", ""), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    return dist.FileStore(str(folder / ".".join(map(str, ids))), size)


def _agent() -> tuple[int, str]:
    """The torchrun agent's process id, and its start time, because ids are reused. The agent is the first ancestor
    that torchrun did not start for this group: the parent, unless a script starts the ranks."""
    group = _variable("self", b"TORCHELASTIC_RUN_ID")
    pid = os.getppid()
    while True:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        parent = int(fields[1])
        if group is None or parent <= 1 or _variable(pid, b"TORCHELASTIC_RUN_ID") != group:
            return pid, fields[19]
        pid = parent


def _variable(pid: int | str, name: bytes) -> bytes | None:
    """NAME=VALUE from a process's initial environment; None if missing or unreadable."""
    try:
        entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    return next((entry for entry in entries if entry.startswith(name + b"=")), None)


_STALE_S = 7 * 24 * 3600.0
"""Delete store files older than this: ranks need them only while starting."""


def _await_all(store: dist.Store, rank: int, size: int) -> None:
    """Return once every rank has started. ValueError names those missing after _MEET_TIMEOUT_S."""
    store.set(f"here {rank}", "1")
    start = time.monotonic()
    report_at = _REPORT_AFTER_S
    missing = list(range(size))
    while missing := [one for one in missing if not store.check([f"here {one}"])]:
        waited = time.monotonic() - start
        if waited > _MEET_TIMEOUT_S:
            raise ValueError(f"rank {rank} of {size} gave up after {waited:.0f} s: ranks {missing} did not start")
        if waited > report_at:
            log.warning("rank %d of %d is waiting for ranks %s to start", rank, size, missing)
            report_at *= 2
        time.sleep(0.02)


def _require_one_kind(kinds: list[str]) -> None:
    if len(set(kinds)) > 1:
        of_each = ", ".join(f"rank {rank}: {kind}" for rank, kind in enumerate(kinds))
        raise ValueError(f"all ranks need the same kind of device, but they have {of_each}; set device to cpu or cuda")


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies: a lost torchrun agent must not leave ranks behind."""
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    pr_set_pdeathsig = 1
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:  # it died in between, so no signal will come
        os._exit(1)


def exit_rank(status: int = 0) -> NoReturn:
    """Exit this rank immediately, after flushing its output and logs.

    Skips interpreter shutdown, during which the threads of torch's process groups have been seen to abort the process
    ("terminate called without an active exception"); torchrun counts one aborted rank as a failure of all. Does not
    wait for peers, as a broken group would.
    """
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):  # a full disk, or closed: output is lost
            status = status or 1
    os._exit(status)


def _agree_on_leader(lead: bool) -> int:
    claims: list[bool] = [False] * dist.get_world_size()
    dist.all_gather_object(claims, lead)
    leaders = [rank for rank, claim in enumerate(claims) if claim]
    if len(leaders) != 1:
        raise RuntimeError(f"exactly one rank must lead, but {len(leaders)} do: ranks {leaders}")
    return leaders[0]


def _make_comm(device: torch.device, leader: int, timeout_s: float, deterministic: bool) -> Comm:
    shared = None
    if is_one_host() and shared_memory.is_supported():
        try:
            shared = shared_memory.SharedMemoryComm(leader=leader, timeout_s=timeout_s)
        except OSError as error:
            log.warning("falling back to gloo: %s", error)
    if shared is not None and device.type == "cpu":
        return shared
    backend = "nccl" if device.type == "cuda" else "gloo"
    return GroupComm(backend, leader=leader, timeout_s=timeout_s, ordered=deterministic, plans=shared)
